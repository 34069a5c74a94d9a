// What the fuzzer's cases are made of (fuzz.cpp): numbers from bytes, buffers of exact size, comparison with plain
// loops.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "api.h"

namespace sparse_ft {
namespace fuzz {

constexpr int64_t kMostFloats = 1 << 15;  // of one buffer: what is larger takes time and shows nothing new

struct TooLarge {};

// The bytes of a case as numbers; zeros once they are used up.
struct Bytes {
    const uint8_t* data;
    size_t size;
    uint8_t byte() { return size > 0 ? (--size, *data++) : 0; }
    uint32_t word() {
        uint32_t value = 0;
        for (int i = 0; i < 4; ++i) value = value << 8 | byte();
        return value;
    }
    // Mostly of the range; now and then any number at all, as a caller may pass.
    int64_t number(int64_t low, int64_t high) {
        const uint8_t b = byte();
        if (b < 250) return low + b % (high - low + 1);
        static constexpr int64_t kOdd[] = {0, -1, INT32_MAX, INT64_MAX / 2, 1 << 20, INT64_MIN / 2};
        return kOdd[b - 250];
    }
    int64_t small(int64_t low, int64_t high) { return low + byte() % (high - low + 1); }
};

inline char described[512];  // the numbers of what is computed

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "fuzz: %s\n%s\n", what, described);
    std::abort();
}

// Memory of exactly `count` numbers. Guarded memory ends, or begins, at a page that cannot be touched.
template <class T, int64_t kMost = kMostFloats>
class Buffer {
  public:
    Buffer(int64_t count, bool guarded, bool at_end = true) : count_(count) {
        if (count < 0 || count > kMost) throw TooLarge();
        const size_t bytes = size_t(count) * sizeof(T), page = 4096;
        if (!guarded) {
            owned_.reset(static_cast<T*>(::operator new(bytes)));
            data_ = owned_.get();
        } else {
            mapped_ = (bytes + page - 1) / page * page + 2 * page;
            base_ =
                static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
            if (base_ == MAP_FAILED) fail("no memory");
            mprotect(base_, page, PROT_NONE);
            mprotect(base_ + mapped_ - page, page, PROT_NONE);
            data_ = reinterpret_cast<T*>(at_end ? base_ + mapped_ - page - bytes : base_ + page);
        }
        for (int64_t i = 0; i < count; ++i) data_[i] = T();
    }
    Buffer(const Buffer&) = delete;
    ~Buffer() {
        if (base_ != nullptr) munmap(base_, mapped_);
    }
    T* get() const { return data_; }
    T& operator[](int64_t i) const { return data_[i]; }
    int64_t size() const { return count_; }

  private:
    struct Free {
        void operator()(T* p) const { ::operator delete(p); }
    };
    int64_t count_;
    std::unique_ptr<T, Free> owned_;
    char* base_ = nullptr;
    size_t mapped_ = 0;
    T* data_;
};

using Floats = Buffer<float>;
using Ints = Buffer<int32_t>;

inline void fill(const Floats& floats, uint32_t seed) {
    std::minstd_rand random(seed + 1);
    for (int64_t i = 0; i < floats.size(); ++i) floats[i] = float(int(random() % 2001) - 1000) / 500.0f;
}

inline int64_t product_of(std::initializer_list<int64_t> sizes) {
    int64_t total = 1;
    for (int64_t size : sizes) {
        if (size < 0 || size > kMostFloats || (total *= size) > kMostFloats) throw TooLarge();
    }
    return total;
}

// A view of (n, c, y, x) in one of the two layouts.
inline View layout(void* data, int64_t n, int64_t c, int64_t y, int64_t x, bool batch_last) {
    return batch_last ? View{data, 1, y * x * n, x * n, n} : View{data, y * x * c, 1, x * c, c};
}

inline float& at(const View& v, int64_t n, int64_t c, int64_t y, int64_t x) {
    return static_cast<float*>(v.data)[n * v.n + c * v.c + y * v.y + x * v.x];
}

// The same numbers as activations of either type. Floats are given as they are; bfloat16 in memory of its own, from
// which finish() brings back what a kernel was given and has written.
class Stored {
  public:
    Stored(const Floats& numbers, Element element, bool guarded = false, bool at_end = true)
        : numbers_(numbers),
          element_(element),
          halves_(element == Element::kFloat ? 0 : numbers.size(), guarded, at_end) {
        for (int64_t i = 0; i < halves_.size(); ++i) {
            uint32_t bits;
            std::memcpy(&bits, &numbers_[i], sizeof bits);
            halves_[i].bits = uint16_t(bits >> 16);
        }
        finish();
    }
    void* get() const { return element_ == Element::kFloat ? static_cast<void*>(numbers_.get()) : halves_.get(); }
    void finish() const {
        for (int64_t i = 0; i < halves_.size(); ++i) {
            const uint32_t bits = uint32_t(halves_[i].bits) << 16;
            std::memcpy(&numbers_[i], &bits, sizeof bits);
        }
    }

  private:
    const Floats& numbers_;
    Element element_;
    Buffer<Bf16> halves_;
};

inline void compare(const float* got, const std::vector<double>& expected, const std::vector<double>& size,
                    const char* what, Element element = Element::kFloat) {
    const double rounding = element == Element::kFloat ? 0 : 1.0 / 256;  // relative to the number itself
    for (size_t i = 0; i < expected.size(); ++i)
        if (got[i] != expected[i] &&
            !(std::abs(got[i] - expected[i]) <= 1e-4 * (1 + size[i]) + rounding * std::abs(expected[i]))) {
            std::fprintf(stderr, "fuzz: number %zu is %g, not %g\n", i, double(got[i]), expected[i]);
            fail(what);
        }
}

// Numbers of any bits among others: infinities, NaN, denormals, the largest.
inline void spoil(float* floats, int64_t count, uint32_t seed) {
    static constexpr uint32_t kBits[] = {0x7f800000, 0xff800000, 0x7fc00000, 0xffffffff,
                                         0x7fffffff, 0x00000001, 0x80000000, 0x7f7fffff};
    std::minstd_rand random(seed + 1);
    for (int64_t i = 0; i < count; ++i) {
        if (random() % 4) continue;
        const uint32_t bits = random() % 2 ? kBits[random() % 8] : uint32_t(random() << 8 ^ random());
        std::memcpy(floats + i, &bits, sizeof bits);
    }
}

inline int32_t magnitude_bits(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & INT32_MAX;
}

// Activations as their definitions have them.
inline double activated(Activation activation, double v) {
    switch (activation) {
        case Activation::kIdentity:
            return v;
        case Activation::kRelu:
            return std::max(v, 0.0);
        case Activation::kRelu6:
            return std::min(std::max(v, 0.0), 6.0);
        case Activation::kSilu:
            return v / (1 + std::exp(-v));
        case Activation::kHardswish:
            return v * std::min(std::max(v + 3, 0.0), 6.0) / 6;
        case Activation::kGelu:
            return v * std::erfc(-v / std::sqrt(2.0)) / 2;
        case Activation::kGeluTanh:
            return v / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    }
    fail("no such activation");
}

// What is fuzzed: fuzz_product.cpp, fuzz_activation.cpp, fuzz_weight.cpp.
void fuzz_product(Bytes& in, const Kernels& kernels, bool guarded);
void fuzz_norm_depthwise(Bytes& in, const Kernels& kernels, bool guarded);
void fuzz_norm(Bytes& in, const Kernels& kernels);
void fuzz_pool(Bytes& in, const Kernels& kernels);
void fuzz_norm_pool(Bytes& in, const Kernels& kernels);
void fuzz_transpose(Bytes& in, const Kernels& kernels, bool guarded);
void fuzz_dropout(Bytes& in, const Kernels& kernels, bool guarded);
void fuzz_compact(Bytes& in, const Kernels& kernels, bool guarded);
void fuzz_rows(Bytes& in);
void fuzz_rows_above(Bytes& in, const Kernels& kernels, bool guarded);
void fuzz_selection(Bytes& in);
void fuzz_positions(Bytes& in);
void fuzz_block(Bytes& in);

}  // namespace fuzz
}  // namespace sparse_ft
