// Pooling in batch-last layout row by row: lanes are samples.
#pragma once
#include <cstring>
#include <limits>
#include <vector>

#include "each_vector.h"
#include "element.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

// GCC takes vectors of bytes apart to convert them, which took longer than all else that pooling does.
inline ivec load_bytes(const uint8_t* p, int count) {
#if defined(__AVX512F__)
    return reinterpret_cast<ivec>(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(__mmask16((1u << count) - 1), p)));
#else
    uint8_t bytes[kLanes] = {};
    std::memcpy(bytes, p, size_t(count));
#if defined(__AVX2__)
    return reinterpret_cast<ivec>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
#else
    ivec v;
    for (int i = 0; i < kLanes; ++i) v[i] = bytes[i];
    return v;
#endif
#endif
}

inline void store_bytes(uint8_t* p, ivec v, int count) {  // of numbers that fit into a byte
#if defined(__AVX512F__)
    _mm512_mask_cvtepi32_storeu_epi8(p, __mmask16((1u << count) - 1), reinterpret_cast<__m512i>(v));
#else
    uint8_t bytes[kLanes];
    for (int i = 0; i < kLanes; ++i) bytes[i] = uint8_t(v[i]);
    std::memcpy(p, bytes, size_t(count));
#endif
}

// Which windows reach each input row, and with which of their taps.
struct WindowsOfRows {
    std::vector<int32_t> start, window, tap;
    explicit WindowsOfRows(const Windows& w) : start(size_t(w.size) + 1) {
        for (int64_t o = 0; o < w.count; ++o)
            for (int32_t t = w.low[o]; t < w.high[o]; ++t) ++start[size_t(w.first[o] + t * w.step) + 1];
        for (size_t i = 0; i < size_t(w.size); ++i) start[i + 1] += start[i];
        window.resize(size_t(start.back()));
        tap.resize(size_t(start.back()));
        std::vector<int32_t> next = start;
        for (int64_t o = 0; o < w.count; ++o)
            for (int32_t t = w.low[o]; t < w.high[o]; ++t) {
                const size_t at = size_t(next[size_t(w.first[o] + t * w.step)]++);
                window[at] = int32_t(o);
                tap[at] = t;
            }
    }
};

// Row `oy` of windows of a channel. `from`: where the channel's row 0 would be if all its rows were in memory; `to`
// and `chosen`: where the row of results goes.
template <class T, bool kMax>
void pool_row(const Pool& q, int64_t oy, const T* from, T* to, uint8_t* chosen) {
    const Windows y = q.y, x = q.x;
    const int64_t n = q.batch, row = x.size * n;
    const T* const corner_of_row = from + y.first[oy] * row;
    const int32_t low_y = y.low[oy], high_y = y.high[oy];
    for (int64_t ox = 0; ox < x.count; ++ox) {
        const int32_t low_x = x.low[ox], high_x = x.high[ox];
        const T* corner = corner_of_row + x.first[ox] * n;
        T* output = to + ox * n;
        const float weight = kMax ? 1.0f : y.scale[oy] * x.scale[ox];
        each_vector(n, [&](int64_t i, int count) {
            vec best = kMax ? splat(-std::numeric_limits<float>::infinity()) : vec{};
            ivec at = ivec{} + (low_y * x.taps + low_x);
            for (int32_t ty = low_y; ty < high_y; ++ty)
                for (int32_t tx = low_x; tx < high_x; ++tx) {
                    const vec v = load(corner + ty * y.step * row + tx * x.step * n + i, count);
                    if (kMax) {
                        const ivec taken = (v > best) | (v != v);  // NaN is the largest, as in torch
                        best = taken ? v : best;
                        at = taken ? ivec{} + (ty * x.taps + tx) : at;
                    } else {
                        best += v;
                    }
                }
            store(output + i, kMax ? best : best * weight, count);
            if (kMax) store_bytes(chosen + ox * n + i, at, count);
        });
    }
}

// Row `y` of the input's gradient of a channel, from the windows that reach it; windows that overlap are added up.
// `grad` and `chosen`: where the channel's begin.
template <class T, bool kMax>
void pool_gradient_row(const Pool& q, const WindowsOfRows& rows, int64_t y, const T* grad_of_channel,
                       const uint8_t* chosen_of_channel, float* to) {
    const Windows x = q.x;
    const int64_t n = q.batch;
    std::fill(to, to + x.size * n, 0.0f);
    for (size_t a = size_t(rows.start[size_t(y)]); a < size_t(rows.start[size_t(y) + 1]); ++a) {
        const int64_t oy = rows.window[a];
        const int32_t taps = rows.tap[a] * x.taps;
        for (int64_t ox = 0; ox < x.count; ++ox) {
            const T* grad = grad_of_channel + (oy * x.count + ox) * n;
            const uint8_t* chosen = chosen_of_channel + (oy * x.count + ox) * n;
            float* corner = to + x.first[ox] * n;
            const int32_t low = x.low[ox], high = x.high[ox];
            const int64_t step = x.step * n;
            const float weight = kMax ? 1.0f : q.y.scale[oy] * x.scale[ox];
            each_vector(n, [=](int64_t i, int count) {
                const vec g = kMax ? load(grad + i, count) : load(grad + i, count) * weight;
                const ivec own = kMax ? load_bytes(chosen + i, count) - taps : ivec{};
                for (int32_t tx = low; tx < high; ++tx) {
                    float* sums = corner + tx * step + i;
                    store(sums, load(sums, count) + (kMax ? (own == ivec{} + tx ? g : vec{}) : g), count);
                }
            });
        }
    }
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
