// Fuzzing of the whole surface of the native core (api.h, convolution.h) under AddressSanitizer and UBSan; see
// `make fuzz`. Bytes become a call: numbers of a geometry, a pattern that is valid or has entries replaced, layouts,
// buffers of exactly the size that sizes and strides say. What must hold, besides the sanitizers' silence:
//   - a product accepts a pattern if and only if it is well-formed, and writes nothing if it is not;
//   - of a well-formed one it computes what plain loops compute, on every instruction set.
// Generated code is not instrumented: its buffers lie against pages that cannot be touched.
//
// The driver below is a small coverage-guided mutator for GCC (-fsanitize-coverage=trace-pc).
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "convolution.h"
#include "dispatch.h"
#include "programs.h"

using namespace sparse_ft;

namespace {

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

char described[512];  // the numbers of the product that is computed

void fail(const char* what) {
    std::fprintf(stderr, "fuzz: %s\n%s\n", what, described);
    std::abort();
}

// Memory of exactly `count` numbers. Guarded memory ends, or begins, at a page that cannot be touched.
template <class T>
class Buffer {
  public:
    Buffer(int64_t count, bool guarded, bool at_end = true) : count_(count) {
        if (count < 0 || count > kMostFloats) throw TooLarge();
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

void fill(const Floats& floats, uint32_t seed) {
    std::minstd_rand random(seed + 1);
    for (int64_t i = 0; i < floats.size(); ++i) floats[i] = float(int(random() % 2001) - 1000) / 500.0f;
}

int64_t product_of(std::initializer_list<int64_t> sizes) {
    int64_t total = 1;
    for (int64_t size : sizes) {
        if (size < 0 || size > kMostFloats || (total *= size) > kMostFloats) throw TooLarge();
    }
    return total;
}

// A view of (n, c, y, x) in one of the two layouts.
View layout(float* data, int64_t n, int64_t c, int64_t y, int64_t x, bool batch_last) {
    return batch_last ? View{data, 1, y * x * n, x * n, n} : View{data, y * x * c, 1, x * c, c};
}

float& at(const View& v, int64_t n, int64_t c, int64_t y, int64_t x) {
    return v.data[n * v.n + c * v.c + y * v.y + x * v.x];
}

void compare(const float* got, const std::vector<double>& expected, const std::vector<double>& size) {
    for (size_t i = 0; i < expected.size(); ++i)
        if (!(std::abs(got[i] - expected[i]) <= 1e-4 * (1 + size[i]))) {
            std::fprintf(stderr, "fuzz: number %zu is %g, not %g\n", i, double(got[i]), expected[i]);
            fail("a product differs from plain loops");
        }
}

void fuzz_product(Bytes& in, const Kernels& kernels, bool guarded) {
    Convolution c{};
    c.groups = in.number(1, 4);
    c.weight = {in.number(0, 24), in.number(0, 20), in.number(1, 4), in.number(1, 4)};
    if (in.byte() % 2) c.weight[0] = std::clamp<int64_t>(c.weight[0], -1, 64) * std::clamp<int64_t>(c.groups, -1, 8);
    if (in.byte() % 4 == 0) c.groups = c.weight[0], c.weight[1] = 1;  // depthwise
    if (in.byte() % 4 == 0) c.weight[2] = c.weight[3] = 1;
    for (int i = 0; i < 2; ++i) {
        c.stride[size_t(i)] = in.number(1, 3);
        c.padding[size_t(i)] = in.number(0, 3);
        c.dilation[size_t(i)] = in.number(1, 3);
    }
    // The two ways in which the core is called: a convolution in batch-last layout, a linear layer token by token.
    const bool batch_last = in.byte() % 3 != 0;
    if (!batch_last) {
        c.weight[2] = c.weight[3] = 1;
        c.stride = c.dilation = {1, 1};
        c.padding = {0, 0};
    }
    check(c);
    const int64_t rows = c.weight[0], channels = c.weight[1] * c.groups, taps = c.weight[2] * c.weight[3];
    const int64_t cols = c.weight[1] * taps, phases = c.stride[0] * c.stride[1];
    const int64_t n = in.number(0, 40), height = batch_last ? in.number(1, 12) : 1,
                  width = batch_last ? in.number(1, 12) : 1;
    product_of({n, height, width});
    Two out;
    for (int i = 0; i < 2; ++i) {
        const int64_t after = batch_last ? in.number(0, 3) : 0;  // padding below and to the right
        const int64_t extent = (i ? width : height) + c.padding[size_t(i)] + after;
        const int64_t reach = c.dilation[size_t(i)] * (c.weight[size_t(2 + i)] - 1) + 1;
        if (after < 0 || after > (1 << 20) || extent < reach) throw TooLarge();
        out[size_t(i)] = (extent - reach) / c.stride[size_t(i)] + 1;
    }
    const bool at_end = in.byte() % 2;
    Floats x(product_of({n, channels, height, width}), guarded, at_end),
        y(product_of({n, rows, out[0], out[1]}), guarded, at_end);
    const View vx = layout(x.get(), n, channels, height, width, batch_last);
    const View vy = layout(y.get(), n, rows, out[0], out[1], batch_last);

    // The pattern of a random mask, through the functions that make patterns.
    const int64_t numel = product_of({rows, cols});
    const uint8_t density = in.byte();
    const uint32_t seed = in.word();
    std::minstd_rand random(seed + 1);
    Buffer<uint8_t> mask(numel, guarded);
    Floats weight(numel, guarded);
    fill(weight, seed);
    for (int64_t i = 0; i < numel; ++i) mask[i] = random() % 256 <= density;
    const int threads = int(in.small(1, 3));
    const int64_t nnz = count_true(mask.get(), numel, threads);
    const int64_t t_rows = product_of({phases, channels});
    Ints row_ptr(rows + 1, guarded), col(nnz, guarded), t_row_ptr(t_rows + 1, guarded), t_col(nnz, guarded),
        perm(nnz, guarded);
    Floats values(nnz, guarded), bias(rows, guarded), value_grad(nnz, guarded);
    build_rows(weight.get(), mask.get(), rows, cols, row_ptr.get(), col.get(), values.get(), threads);
    if (validate_rows(row_ptr.get(), rows, col.get(), nnz, cols) != nullptr) fail("a built pattern is malformed");
    const PatternShape shape = pattern_shape(c);
    build_transpose(shape, row_ptr.get(), col.get(), t_row_ptr.get(), t_col.get(), perm.get());
    fill(bias, seed + 1);

    const int which = int(in.small(0, 2));
    bool spoilt = false;
    std::vector<int32_t> t_before(t_col.get(), t_col.get() + nnz);
    for (int64_t i = in.byte() % 4 == 0 ? in.small(1, 3) : 0; i > 0; --i) {
        const Ints* arrays[] = {&row_ptr, &col, &t_row_ptr, &t_col, &perm};
        const Ints& array = *arrays[which == 1 ? 2 + in.byte() % 3 : in.byte() % 2];
        if (array.size() == 0) continue;
        int32_t& entry = array[in.word() % array.size()];
        const int32_t value = in.byte() % 2 ? int32_t(in.word()) : entry + int32_t(in.small(0, 8)) - 4;
        spoilt |= value != entry;
        entry = value;
    }
    std::snprintf(
        described, sizeof described,
        "%s product %d: weight %ld %ld %ld %ld, groups %ld, stride %ld %ld, padding %ld %ld, dilation %ld %ld, "
        "input %ld %ld %ld, output %ld %ld, batch-last %d, nnz %ld, threads %d",
        kernels.name, which, long(c.weight[0]), long(c.weight[1]), long(c.weight[2]), long(c.weight[3]),
        long(c.groups), long(c.stride[0]), long(c.stride[1]), long(c.padding[0]), long(c.padding[1]),
        long(c.dilation[0]), long(c.dilation[1]), long(n), long(height), long(width), long(out[0]), long(out[1]),
        batch_last, long(nnz), threads);
    const bool well_formed = validate_rows(row_ptr.get(), rows, col.get(), nnz, cols) == nullptr;
    Programs programs;
    const int repeats = guarded ? 2 : 1;  // the second time, a generated program is found
    for (int repeat = 0; repeat < repeats; ++repeat) {
        const char* problem = nullptr;
        std::vector<double> expected, size;
        if (which == 0 || which == 2) {
            ForwardProduct f(c, {n, channels, height, width}, vx, out, row_ptr.get(), col.get(), nnz, &programs,
                             threads);
            fill(x, seed + 2);
            f.product.values = values.get();
            const bool with_bias = seed % 2;
            if (which == 0) {
                f.product.bias = with_bias ? bias.get() : nullptr;
                f.product.dest = vy;
                problem = kernels.gather_product(f.product);
            } else {
                fill(y, seed + 3);
                f.product.grad = vy;
                f.product.value_grad = value_grad.get();
                problem = kernels.sampled_product(f.product);
            }
            if ((problem == nullptr) != well_formed) fail("a product judges a pattern other than validate_rows");
            if (problem != nullptr) continue;
            expected.assign(size_t(which ? nnz : y.size()), 0);
            size.assign(expected.size(), 0);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t b = 0; b < n; ++b)
                    for (int64_t oy = 0; oy < out[0]; ++oy)
                        for (int64_t ox = 0; ox < out[1]; ++ox) {
                            const size_t place = size_t(&at(vy, b, r, oy, ox) - y.get());
                            if (which == 0 && with_bias) expected[place] = bias[r];
                            for (int32_t j = row_ptr[r]; j < row_ptr[r + 1]; ++j) {
                                const int64_t tap = col[j] % taps;
                                const int64_t channel = r / c.out_per_group() * c.weight[1] + col[j] / taps;
                                const int64_t sy = oy * c.stride[0] + tap / c.weight[3] * c.dilation[0] - c.padding[0];
                                const int64_t sx = ox * c.stride[1] + tap % c.weight[3] * c.dilation[1] - c.padding[1];
                                if (sy < 0 || sy >= height || sx < 0 || sx >= width) continue;
                                const double s = at(vx, b, channel, sy, sx);
                                const double term = s * (which ? at(vy, b, r, oy, ox) : values[j]);
                                expected[which ? size_t(j) : place] += term;
                                size[which ? size_t(j) : place] += std::abs(term);
                            }
                        }
            compare(which ? value_grad.get() : y.get(), expected, size);
        } else {
            InputGradProduct g(c, {n, channels, height, width}, vy, out, vx, t_row_ptr.get(), t_col.get(), perm.get(),
                               values.get(), nnz, &programs, threads);
            fill(y, seed + 3);
            problem = kernels.gather_product(g.product);
            if (problem != nullptr && !spoilt) fail("an input gradient refuses a well-formed pattern");
            if (problem != nullptr || spoilt) continue;
            expected.assign(size_t(x.size()), 0);
            size.assign(expected.size(), 0);
            for (int64_t r = 0; r < rows; ++r)
                for (int32_t j = row_ptr[r]; j < row_ptr[r + 1]; ++j) {
                    const int64_t tap = col[j] % taps;
                    const int64_t channel = r / c.out_per_group() * c.weight[1] + col[j] / taps;
                    for (int64_t b = 0; b < n; ++b)
                        for (int64_t oy = 0; oy < out[0]; ++oy)
                            for (int64_t ox = 0; ox < out[1]; ++ox) {
                                const int64_t sy = oy * c.stride[0] + tap / c.weight[3] * c.dilation[0] - c.padding[0];
                                const int64_t sx = ox * c.stride[1] + tap % c.weight[3] * c.dilation[1] - c.padding[1];
                                if (sy < 0 || sy >= height || sx < 0 || sx >= width) continue;
                                const size_t place = size_t(&at(vx, b, channel, sy, sx) - x.get());
                                const double term = double(values[j]) * at(vy, b, r, oy, ox);
                                expected[place] += term;
                                size[place] += std::abs(term);
                            }
                }
            compare(x.get(), expected, size);
        }
    }
}

void fuzz_rows(Bytes& in) {
    const int64_t rows = in.small(0, 6), nnz = in.small(0, 12), cols = in.number(0, 9);
    Ints row_ptr(rows + 1, false), col(nnz, false);
    for (int64_t i = 0; i <= rows; ++i) row_ptr[i] = in.byte() % 8 ? int32_t(in.small(0, nnz)) : int32_t(in.word());
    for (int64_t i = 0; i < nnz; ++i) col[i] = in.byte() % 8 ? int32_t(in.small(0, 9)) : int32_t(in.word());
    const bool valid = validate_rows(row_ptr.get(), rows, col.get(), nnz, cols) == nullptr;
    if (fingerprint(col.get(), nnz) != fingerprint(col.get(), nnz)) fail("a fingerprint changes");
    if (!valid) return;
    int64_t entries = 0;
    for (int64_t r = 0; r < rows; ++r)
        for (int32_t j = row_ptr[r]; j < row_ptr[r + 1]; ++j, ++entries)
            if (col[j] < 0 || col[j] >= cols) fail("a column out of range is accepted");
    if (entries != nnz) fail("a pattern with entries in no row is accepted");
}

// The bits of a gap code one by one, as docs/format.md says; false where it calls the code wrong.
bool read_gaps(const Buffer<uint8_t>& code, int64_t count, int64_t numel, std::vector<int64_t>* positions) {
    if (code.size() == 0 || code[0] > 16 || code[code.size() - 1] == 0) return false;
    auto bit = [&](int64_t i) { return int64_t(code[1 + i / 8] >> i % 8 & 1); };
    const int64_t bits = 8 * (code.size() - 1);
    int64_t position = -1, zeros = 0, last = -1;
    for (int64_t i = (count * code[0] + 7) / 8 * 8; i < bits; ++i) {
        if (bit(i) == 0) {
            ++zeros;
            continue;
        }
        if (int64_t(positions->size()) == count) return false;
        int64_t remainder = 0;
        for (int64_t k = 0; k < code[0]; ++k) remainder |= bit(int64_t(positions->size()) * code[0] + k) << k;
        position += (zeros << code[0]) + remainder + 1;
        positions->push_back(position);
        zeros = 0;
        last = i;
    }
    return count > 0 && int64_t(positions->size()) == count && position < numel && last / 8 == bits / 8 - 1;
}

void fuzz_positions(Bytes& in) {
    const bool gaps = in.byte() % 2;
    const int64_t numel = in.small(0, 250) * in.small(1, 20);
    Buffer<uint8_t> code(gaps ? in.small(0, 90) : (numel + 7) / 8, false);
    for (int64_t i = 0; i < code.size(); ++i) code[i] = in.byte();
    if (gaps && code.size() > 0 && code[0] > 200) code[0] = uint8_t(code[0] % 20);
    std::vector<int64_t> expected;
    bool right;
    int64_t count = in.number(0, 60);
    if (gaps) {
        // Mostly as many as there are ones after the remainders: most codes of another number are refused at once.
        for (int64_t i = 0; in.byte() % 8 != 0 && i < 60; ++i) {
            expected.clear();
            if (read_gaps(code, i, numel, &expected)) count = i;
            if (count == i) break;
        }
        expected.clear();
        if (count < 0 || count > kMostFloats) throw TooLarge();
        right = read_gaps(code, count, numel, &expected) && count <= numel;
    } else {
        for (int64_t i = 0; i < 8 * code.size(); ++i)
            if (code[i / 8] >> i % 8 & 1) expected.push_back(i);
        if (in.byte() % 8 != 0) count = int64_t(expected.size());
        right = int64_t(expected.size()) == count && (expected.empty() || expected.back() < numel);
    }
    Ints positions(count, false);
    const char* problem = gaps ? decode_gaps(code.get(), code.size(), count, numel, positions.get())
                               : decode_bitmap(code.get(), numel, count, positions.get());
    if ((problem == nullptr) != right) fail("positions are judged other than the format says");
    if (right && !std::equal(expected.begin(), expected.end(), positions.get())) fail("positions differ");
    Floats values(count, false), dense(numel, false);
    fill(values, 1);
    if (in.byte() % 4 == 0 && count > 0) positions[in.word() % count] = int32_t(in.word());
    const bool inside = std::all_of(positions.get(), positions.get() + count,
                                    [&](int32_t position) { return position >= 0 && position < numel; });
    if ((scatter(positions.get(), count, 4, values.get(), numel, dense.get()) >= 0) != inside)
        fail("a position beyond the end is judged wrongly");
    Buffer<uint16_t> narrow_values(count, false), narrow(numel, false);
    if (scatter(positions.get(), count, 2, narrow_values.get(), numel, narrow.get()) != (inside ? count : -1))
        fail("zeros are miscounted");
}

void fuzz_norm(Bytes& in, const Kernels& kernels) {
    Norm q{};
    q.channels = in.small(0, 9);
    q.size = in.small(0, 70);
    q.activation = activation_of(int(in.number(0, 6)));
    q.threads = int(in.small(1, 3));
    q.eps = 1e-5f;
    const int64_t numel = q.channels * q.size;
    const uint8_t given = in.byte();
    const uint32_t seed = in.word();
    Floats x(numel, false), residual(numel, false), y(numel, false), grad(numel, false), grad_x(numel, false),
        grad_residual(numel, false), weight(q.channels, false), bias(q.channels, false), mean(q.channels, false),
        variance(q.channels, false), rstd(q.channels, false), grad_weight(q.channels, false),
        grad_bias(q.channels, false);
    for (const Floats* floats : {&x, &residual, &grad, &weight, &bias, &mean}) fill(*floats, seed);
    for (int64_t i = 0; i < q.channels; ++i) variance[i] = std::abs(mean[i]);
    q.x = x.get();
    q.residual = given & 1 ? residual.get() : nullptr;
    q.weight = given & 2 ? weight.get() : nullptr;
    q.bias = given & 2 ? bias.get() : nullptr;
    q.mean = mean.get();
    q.variance = variance.get();
    q.rstd = rstd.get();
    q.measure = given & 4;
    q.y = given & 8 ? y.get() : nullptr;
    kernels.norm_forward(q);
    q.grad = grad.get();
    q.output = given & 8 ? y.get() : nullptr;
    q.training = q.measure;
    q.grad_x = given & 16 ? grad_x.get() : nullptr;
    q.grad_residual = given & 32 && q.residual ? grad_residual.get() : nullptr;
    q.grad_weight = given & 64 ? grad_weight.get() : nullptr;
    q.grad_bias = given & 64 ? grad_bias.get() : nullptr;
    kernels.norm_backward(q);
    for (int64_t i = 0; i < (q.y ? numel : 0); ++i)
        if (std::isnan(y[i])) fail("a norm of finite numbers is not a number");
}

std::unique_ptr<PoolAxis> pool_axis(Bytes& in, bool maximum) {
    const int64_t size = in.number(0, 12);
    std::vector<int32_t> first, end;
    std::vector<float> scale;
    for (int64_t i = in.small(0, 6); i > 0; --i) {
        first.push_back(int32_t(in.number(-3, 12)));
        if (maximum) continue;
        end.push_back(int32_t(int64_t(first.back()) + (first.back() < 100 ? in.small(0, 4) : 0)));
        scale.push_back(0.5f);
    }
    if (maximum)
        return std::make_unique<PoolAxis>(size, first, int32_t(in.number(1, 15)), int32_t(in.number(1, 3)), scale);
    return std::make_unique<PoolAxis>(size, first, end, scale);
}

void fuzz_pool(Bytes& in, const Kernels& kernels) {
    const bool maximum = in.byte() % 2;
    const auto y = pool_axis(in, maximum), x = pool_axis(in, maximum);
    if (maximum && int64_t(y->windows.taps) * x->windows.taps > 255) throw TooLarge();  // refused above this level
    const int64_t batch = in.small(0, 40), channels = in.small(0, 3);
    const int64_t from = product_of({batch, channels, y->windows.size, x->windows.size});
    const int64_t to = product_of({batch, channels, y->windows.count, x->windows.count});
    Floats input(from, false), output(to, false), grad(to, false), grad_input(from, false);
    Buffer<uint8_t> chosen(to, false);
    fill(input, in.word());
    fill(grad, 1);
    Pool q{
        batch,   channels, y->windows,         x->windows, input.get(), output.get(), maximum ? chosen.get() : nullptr,
        nullptr, nullptr,  int(in.small(1, 3))};
    kernels.pool_forward(q);
    for (int64_t i = 0; i < to && in.size > 0; ++i) chosen[i] = in.byte();  // a saved tensor that was written to
    q.grad = grad.get();
    q.grad_input = grad_input.get();
    kernels.pool_backward(q);
}

void fuzz_transpose(Bytes& in, const Kernels& kernels, bool guarded) {
    Transpose q{};
    q.batch_outer = in.small(0, 3);
    q.batch_inner = in.small(0, 9);
    q.rows = in.small(0, 70);
    q.cols = in.small(0, 70);
    q.threads = int(in.small(1, 3));
    const int64_t pad = in.small(0, 2);
    q.from_row = q.cols + pad;
    q.from_inner = q.rows * q.from_row;
    q.from_outer = q.batch_inner * q.from_inner;
    q.to_col = q.rows + pad;
    q.to_inner = q.cols * q.to_col;
    q.to_outer = q.batch_inner * q.to_inner;
    const bool at_end = in.byte() % 2;
    Floats from(product_of({q.batch_outer, q.batch_inner, q.rows, q.from_row}), guarded, at_end),
        to(product_of({q.batch_outer, q.batch_inner, q.cols, q.to_col}), guarded, at_end);
    fill(from, in.word());
    q.from = from.get();
    q.to = to.get();
    kernels.transpose(q);
    for (int64_t b = 0; b < q.batch_outer * q.batch_inner; ++b)
        for (int64_t i = 0; i < q.rows; ++i)
            for (int64_t k = 0; k < q.cols; ++k)
                if (from[b * q.from_inner + i * q.from_row + k] != to[b * q.to_inner + k * q.to_col + i])
                    fail("a transpose differs");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static const std::vector<const Kernels*> all = available_kernels();
    Bytes in{data, size};
    const uint8_t op = in.byte();
    const Kernels& kernels = *all[in.byte() % all.size()];
    const bool guarded = std::strstr(kernels.name, "jit") != nullptr;
    try {
        switch (op % 12) {
            case 7:
                fuzz_rows(in);
                break;
            case 8:
                fuzz_norm(in, kernels);
                break;
            case 9:
                fuzz_pool(in, kernels);
                break;
            case 10:
                fuzz_transpose(in, kernels, guarded);
                break;
            case 11:
                fuzz_positions(in);
                break;
            default:
                fuzz_product(in, kernels, guarded);
        }
    } catch (const TooLarge&) {
    } catch (const std::invalid_argument&) {  // the two ways in which the core refuses numbers
    } catch (const std::length_error&) {
    }
    return 0;
}

// ---- driver: mutate inputs that reached new code, until the time is up ------------------------

namespace {

constexpr size_t kPlaces = 1 << 16;
uint8_t reached[kPlaces];
std::vector<uint8_t> current;
std::string crash_file;

void save_current() {
    if (FILE* file = std::fopen(crash_file.c_str(), "wb")) {
        std::fwrite(current.data(), 1, current.size(), file);
        std::fclose(file);
        std::fprintf(stderr, "fuzz: the input is in %s\n", crash_file.c_str());
    }
}

void mutate(std::vector<uint8_t>& bytes, const std::vector<std::vector<uint8_t>>& corpus, std::mt19937& random) {
    for (uint32_t i = 1 + random() % 6; i > 0; --i) {
        const size_t place = bytes.empty() ? 0 : random() % bytes.size();
        switch (random() % 6) {
            case 0:
                if (!bytes.empty()) bytes[place] ^= uint8_t(1 << random() % 8);
                break;
            case 1:
                if (!bytes.empty()) bytes[place] = uint8_t(random());
                break;
            case 2:
                if (!bytes.empty()) bytes[place] = uint8_t(250 + random() % 6);
                break;
            case 3:
                bytes.insert(bytes.begin() + int64_t(place), uint8_t(random()));
                break;
            case 4:
                if (bytes.size() > 1) bytes.erase(bytes.begin() + int64_t(place));
                break;
            default: {  // the end of another
                const auto& other = corpus[random() % corpus.size()];
                const size_t from = other.empty() ? 0 : random() % other.size();
                bytes.resize(std::min(place, bytes.size()));
                bytes.insert(bytes.end(), other.begin() + int64_t(from), other.end());
            }
        }
    }
    if (bytes.size() > 512) bytes.resize(512);
}

}  // namespace

extern "C" const char* __asan_default_options() { return "handle_abort=1:handle_sigfpe=1:detect_leaks=0"; }
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }

extern "C" __attribute__((no_sanitize("address", "undefined"), no_sanitize_coverage)) void __sanitizer_cov_trace_pc() {
    const auto place = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
    reached[(place >> 1 ^ place >> 17) % kPlaces] = 1;
}

int main(int argc, char** argv) {
    if (argc != 4 && argc != 3) {
        std::fprintf(stderr, "usage: fuzz SECONDS CRASH_FILE [SEED]  |  fuzz replay FILE\n");
        return 2;
    }
    if (std::strcmp(argv[1], "replay") == 0) {
        std::ifstream file(argv[2], std::ios::binary);
        const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
        return LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    }
    const double seconds = std::atof(argv[1]);
    crash_file = argv[2];
    std::mt19937 random(argc == 4 ? uint32_t(std::atol(argv[3])) : 0);
    __sanitizer_set_death_callback(save_current);
    std::vector<std::vector<uint8_t>> corpus{{}};
    std::vector<uint8_t> seen(kPlaces);
    size_t places = 0;
    uint64_t runs = 0;
    const auto start = std::chrono::steady_clock::now();
    auto elapsed = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
    while (elapsed() < seconds) {
        if (random() % 4 == 0) {  // from nothing
            current.resize(16 + random() % 100);
            for (uint8_t& byte : current) byte = uint8_t(random());
        } else {
            current = corpus[random() % corpus.size()];
            mutate(current, corpus, random);
        }
        std::memset(reached, 0, sizeof reached);
        LLVMFuzzerTestOneInput(current.data(), current.size());
        ++runs;
        bool fresh = false;
        for (size_t i = 0; i < kPlaces; ++i)
            if (reached[i] && !seen[i]) seen[i] = 1, ++places, fresh = true;
        if (fresh) corpus.push_back(current);
    }
    std::printf("%llu calls in %.0f s, %zu places in the code, %zu inputs kept\n",
                static_cast<unsigned long long>(runs), elapsed(), places, corpus.size());
    return 0;
}
