// One vector type for every instruction set: GCC/Clang vector extensions, compiled once per set.
// kLanes floats per vector; arithmetic operators work element by element and contract to FMA.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sparse_ft {
namespace SPARSE_FT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vec __attribute__((vector_size(kLanes * 4), may_alias));
typedef float vec_u __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(kLanes * 4), may_alias));
typedef float vec8 __attribute__((vector_size(32), may_alias));
typedef float vec8_u __attribute__((vector_size(32), aligned(4), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const vec_u*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<vec_u*>(p) = v; }
// The first `count` floats at p; the other lanes are 0.
inline vec load_some(const float* p, int count) {
    vec v = {};
    std::memcpy(&v, p, size_t(count) * sizeof(float));
    return v;
}

// Stores a whole, aligned vector to memory around the caches. Where there is no such store, an ordinary one.
inline void store_around(float* p, vec v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, __m512(v));
#elif defined(__AVX2__)
    _mm256_stream_ps(p, __m256(v));
#else
    store(p, v);
#endif
}
// To be called by every thread that did so, before others read what it stored.
inline void finish_stores_around() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

inline vec splat(float x) { return x - vec{}; }

// The first `count` lanes of v; the others become +0 (also when they hold NaN).
inline vec keep_lanes(vec v, ivec mask) { return reinterpret_cast<vec>(reinterpret_cast<ivec>(v) & mask); }
inline ivec lane_mask(int count) {
    ivec mask;
    for (int i = 0; i < kLanes; ++i) mask[i] = i < count ? -1 : 0;
    return mask;
}

// The same for the last vector of a run; `count` is a constant kLanes for all others.
inline vec keep_lanes(vec v, int count) { return count == kLanes ? v : keep_lanes(v, lane_mask(count)); }
inline vec load(const float* p, int count) {  // the lanes beyond `count` are zero
    if (count == kLanes) return load(p);
    vec v = {};
    std::memcpy(&v, p, size_t(count) * sizeof(float));
    return v;
}
inline void store(float* p, vec v, int count) {
    if (count == kLanes) return store(p, v);
    std::memcpy(p, &v, size_t(count) * sizeof(float));
}

inline float sum(vec v) {
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
}

// Sums of eight vectors at once: out[i] = sum(v[i]). A shuffle tree costs about five operations
// a sum; eight separate horizontal sums would cost as much as the products that they close.
inline vec8 sum8(const vec* v) {
    vec8 h[8];
    for (int i = 0; i < 8; ++i) {
#if defined(__AVX512F__)
        h[i] = __builtin_shufflevector(v[i], v[i], 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v[i], v[i], 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
        h[i] = v[i];
#else
        h[i] = vec8{v[i][0], v[i][1], v[i][2], v[i][3], 0, 0, 0, 0};
#endif
    }
    vec8 q[4];
    for (int i = 0; i < 4; ++i) {  // per 128-bit half: pairs (0+1, 2+3) of h[2i] then of h[2i+1]
        const vec8 a = h[2 * i], b = h[2 * i + 1];
        q[i] = __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
               __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
    }
    vec8 r[2];
    for (int i = 0; i < 2; ++i) {
        const vec8 a = q[2 * i], b = q[2 * i + 1];
        r[i] = __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
               __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
    }
    return __builtin_shufflevector(r[0], r[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(r[0], r[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

// 8 rows of 8 floats -> transposed, in registers.
inline void transpose8(vec8* r) {
    vec8 t[8], u[8];
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[2 * i + 1] = __builtin_shufflevector(r[2 * i], r[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 2; ++i) {
        const vec8* a = t + 4 * i;
        u[4 * i] = __builtin_shufflevector(a[0], a[2], 0, 1, 8, 9, 4, 5, 12, 13);
        u[4 * i + 1] = __builtin_shufflevector(a[0], a[2], 2, 3, 10, 11, 6, 7, 14, 15);
        u[4 * i + 2] = __builtin_shufflevector(a[1], a[3], 0, 1, 8, 9, 4, 5, 12, 13);
        u[4 * i + 3] = __builtin_shufflevector(a[1], a[3], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = __builtin_shufflevector(u[i], u[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        r[i + 4] = __builtin_shufflevector(u[i], u[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < cols. Sixteen columns at a time over all
// rows: a read line is used whole at once, which matters where the row stride puts all rows into one cache set.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                      int64_t cols) {
    constexpr int64_t kStrip = 16;
    for (int64_t strip = 0; strip < cols; strip += kStrip) {
        const int64_t end = strip + kStrip < cols ? strip + kStrip : cols;
        int64_t i = 0;
        for (; i + 8 <= rows; i += 8) {
            int64_t j = strip;
            for (; j + 8 <= end; j += 8) {
                vec8 block[8];
                for (int k = 0; k < 8; ++k)
                    block[k] = *reinterpret_cast<const vec8_u*>(from + (i + k) * from_stride + j);
                transpose8(block);
                for (int k = 0; k < 8; ++k) *reinterpret_cast<vec8_u*>(to + (j + k) * to_stride + i) = block[k];
            }
            for (; j < end; ++j)
                for (int k = 0; k < 8; ++k) to[j * to_stride + i + k] = from[(i + k) * from_stride + j];
        }
        for (; i < rows; ++i)
            for (int64_t j = strip; j < end; ++j) to[j * to_stride + i] = from[i * from_stride + j];
    }
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
