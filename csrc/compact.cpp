// Keeping the largest values of an activation: a bit for each place, and the values that were kept, in order.
#include <algorithm>
#include <cmath>
#include <omp.h>

#include "kernels.h"
#include "simd.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

// The samples at a column, of those that a byte has bits for.
inline int64_t lanes_at(const Compact& a, int64_t block, int64_t column) {
    return std::clamp<int64_t>(a.lanes - block * a.block_lanes - column * a.column_lanes, 0, 8);
}

// A bit for each of the first `lanes` floats whose magnitude is above the threshold, or that are NaN.
inline uint8_t bits_above(const float* x, int64_t lanes, float threshold) {
#if defined(__AVX2__)
    if (lanes == 8) {
        const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_loadu_ps(x));
        return uint8_t(_mm256_movemask_ps(_mm256_cmp_ps(magnitude, _mm256_set1_ps(threshold), _CMP_NLE_UQ)));
    }
#endif
    unsigned bits = 0;
    for (int64_t i = 0; i < lanes; ++i) bits |= unsigned(!(std::abs(x[i]) <= threshold)) << i;
    return uint8_t(bits);
}

// Copies the values that have a bit; returns the end of what was written.
inline float* pack_values(const float* x, int64_t lanes, uint8_t bits, float* to) {
#if defined(__AVX512F__)
    if (lanes == 8) {
        const int count = __builtin_popcount(bits);
        _mm256_mask_storeu_ps(to, __mmask8((1u << count) - 1), _mm256_maskz_compress_ps(bits, _mm256_loadu_ps(x)));
        return to + count;
    }
#endif
    (void)lanes;
    for (unsigned left = bits; left; left &= left - 1) *to++ = x[__builtin_ctz(left)];
    return to;
}

// body(floats of a column's samples, how many, number of its byte) for a block of a channel.
template <class Body>
void each_column(const Compact& a, const View& x, int64_t block, int64_t channel, Body body) {
    const int64_t plane = block * a.channels + channel;
    float* from = static_cast<float*>(x.data) + channel * x.c + block * a.block_lanes;
    for (int64_t row = 0, at = plane * a.height * a.width; row < a.height; ++row)
        for (int64_t residue = 0; residue < a.column_step; ++residue)
            for (int64_t col = residue; col < a.width; col += a.column_step)
                body(from + row * x.y + col * x.x, lanes_at(a, block, col), at++);
}

}  // namespace

void compact_bits(const Compact& a, const View& x, float threshold, uint8_t* bits, int64_t* counts, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < a.channels * a.blocks; ++i) {  // a channel's blocks share lines of memory
        const int64_t channel = i / a.blocks, block = i % a.blocks;
        int64_t count = 0;
        each_column(a, x, block, channel, [&](const float* from, int64_t lanes, int64_t at) {
            bits[at] = bits_above(from, lanes, threshold);
            count += __builtin_popcount(bits[at]);
        });
        counts[block * a.channels + channel] = count;
    }
}

void compact_values(const Compact& a, const View& x, float* values, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < a.channels * a.blocks; ++i) {
        const int64_t channel = i / a.blocks, block = i % a.blocks;
        float* to = values + a.start[block * a.channels + channel];
        each_column(a, x, block, channel, [&](const float* from, int64_t lanes, int64_t at) {
            to = pack_values(from, lanes, a.bits[at], to);
        });
    }
}

void compact_expand(const Compact& a, const View& x, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t i = 0; i < a.channels * a.blocks; ++i) {
        const int64_t channel = i / a.blocks, block = i % a.blocks;
        const float* from = a.values + a.start[block * a.channels + channel];
        each_column(a, x, block, channel, [&](float* to, int64_t lanes, int64_t at) {
            std::fill(to, to + lanes, 0.0f);
            for (unsigned left = a.bits[at]; left; left &= left - 1) to[__builtin_ctz(left)] = *from++;
        });
    }
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
