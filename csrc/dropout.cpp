// Dropout: y = x * scale, or x * 0 with probability p. An element's random number is computed from its place, so no
// mask is kept, and the result depends neither on the number of threads nor on the instruction set.
//
// The generator is Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"). Element i
// has word i % 4 of the counter i / 4, whose upper two words are zero; the seed is the key.
#include <omp.h>

#include "bypass.h"
#include "kernels.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

// A word of a counter in the lower half of each lane, where the multiplication reads it; in the upper half is
// anything.
typedef uint64_t wide __attribute__((vector_size(kLanes * 4), may_alias));
constexpr int kCounters = kLanes / 2;
constexpr int kRounds = 10;
constexpr int kTogether = 2;  // vectors of counters: a round is a chain of multiplications, and one waits for another
constexpr int kVectors = 2 * kTogether;

inline wide multiply(wide words, uint32_t by) {
#if defined(__AVX512F__)
    return wide(_mm512_mul_epu32(__m512i(words), _mm512_set1_epi64(by)));
#elif defined(__AVX2__)
    return wide(_mm256_mul_epu32(__m256i(words), _mm256_set1_epi64x(by)));
#else
    return (words & UINT32_MAX) * by;
#endif
}

// Every other lane of a and b in turns, from lane 0 or lane 1 on.
#if defined(__AVX512F__)
inline uvec lower(wide a, wide b) { return uvec(__builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14)); }
inline uvec upper(wide a, wide b) { return uvec(__builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15)); }
#elif defined(__AVX2__)
inline uvec lower(wide a, wide b) { return uvec(__builtin_shufflevector(a, b, 0, 4, 2, 6)); }
inline uvec upper(wide a, wide b) { return uvec(__builtin_shufflevector(a, b, 1, 5, 3, 7)); }
#else
inline uvec lower(wide a, wide b) { return uvec(__builtin_shufflevector(a, b, 0, 2)); }
inline uvec upper(wide a, wide b) { return uvec(__builtin_shufflevector(a, b, 1, 3)); }
#endif

class Philox {
  public:
    explicit Philox(uint64_t seed) {
        uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
        for (int i = 0; i < kRounds; ++i) {
            keys_[i][0] = key[0];
            keys_[i][1] = key[1];
            key[0] += 0x9E3779B9u;
            key[1] += 0xBB67AE85u;
        }
        // `lower` and `upper` take every other lane.
        for (int i = 0; i < kCounters; ++i) order_[i] = uint64_t(i / 2 + i % 2 * (kCounters / 2));
    }

    // The words of kTogether * kCounters counters, one counter's after another's; `first` is a multiple of as many.
    void words(uint64_t first, uvec* to) const {
        wide a[kTogether], b[kTogether], c[kTogether], d[kTogether];
        for (int v = 0; v < kTogether; ++v) {
            a[v] = order_ + (first + uint64_t(v * kCounters));
            b[v] = wide{} + (first >> 32);
            c[v] = d[v] = wide{};
        }
#pragma GCC unroll 10
        for (int i = 0; i < kRounds; ++i)
            for (int v = 0; v < kTogether; ++v) {
                const wide left = multiply(a[v], 0xD2511F53u), right = multiply(c[v], 0xCD9E8D57u);
                a[v] = right >> 32 ^ b[v] ^ keys_[i][0];
                b[v] = right;
                c[v] = left >> 32 ^ d[v] ^ keys_[i][1];
                d[v] = left;
            }
        for (int v = 0; v < kTogether; ++v) {
            const wide front = (a[v] & UINT32_MAX) | b[v] << 32, back = (c[v] & UINT32_MAX) | d[v] << 32;
            to[2 * v] = lower(front, back);
            to[2 * v + 1] = upper(front, back);
        }
    }

  private:
    uint64_t keys_[kRounds][2];
    wide order_;
};

template <class T>
void drop(const Dropout& q) {
    const T* x = static_cast<const T*>(q.x);
    T* y = static_cast<T*>(q.y);
    const Philox random(q.seed);
    const vec scale = splat(q.scale);
    const bool around = q.size * int64_t(sizeof(T)) > kBypassBytes && aligned_for_vectors(y);
    const auto dropped = [&](vec v, uvec word) { return v * keep_lanes(scale, ivec(word >= q.least_kept)); };
    constexpr int64_t kBlock = kVectors * kLanes;
    const int64_t whole = q.size / kBlock * kBlock;
#pragma omp parallel num_threads(q.threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < whole; i += kBlock) {
            uvec words[kVectors];
            random.words(uint64_t(i / 4), words);
            for (int v = 0; v < kVectors; ++v) {
                const vec result = dropped(load(x + i + v * kLanes), words[v]);
                around ? store_around(y + i + v * kLanes, result) : store(y + i + v * kLanes, result);
            }
        }
        finish_stores_around();
    }
    uvec words[kVectors];
    if (whole < q.size) random.words(uint64_t(whole / 4), words);
    each_vector(q.size - whole, [&](int64_t i, int count) {
        store(y + whole + i, dropped(load(x + whole + i, count), words[i / kLanes]), count);
    });
}

}  // namespace

void dropout(const Dropout& q) {
    with_element(q.element, [&](auto element) { drop<decltype(element)>(q); });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
