// One vector type for every instruction set: GCC/Clang vector extensions, compiled once per set.
// kLanes floats per vector; arithmetic operators work element by element and contract to FMA.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// For what short loops would else be handed by way of memory: a load that spans several stores of just now waits until
// they have reached the cache.
#define SPARSE_FT_INLINE inline __attribute__((always_inline))

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
typedef float vec4 __attribute__((vector_size(16), may_alias));
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

// Into the second-level cache. GCC drops calls of a function that does nothing but this, unless it holds an `asm`.
inline void prefetch(const void* p) {
    __builtin_prefetch(p, 0, 2);
    asm volatile("");
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

// `v` as a register holds it: the compiler may not read it from memory again for every use.
inline vec in_register(vec v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__SSE2__)
    asm("" : "+x"(v));
#endif
    return v;
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
#if defined(__AVX512F__)
    return vec(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p));
#else
    return load_some(p, count);
#endif
}
inline void store(float* p, vec v, int count) {
    if (count == kLanes) return store(p, v);
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), __m512(v));
#else
    std::memcpy(p, &v, size_t(count) * sizeof(float));
#endif
}

// a * b + c, rounded once where the instruction set can, wherever it is inlined.
inline vec multiply_add(vec a, vec b, vec c) {
#if defined(__AVX512F__)
    return vec(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__AVX2__)
    return vec(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
    return a * b + c;
#endif
}

// By halves: one lane after another would be a chain of as many additions, which short channels wait for.
inline float sum(vec v) {
#if defined(__AVX512F__)
    const vec8 half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    const vec half = v;
#endif
#if defined(__AVX2__)
    const vec4 quarter =
        __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#else
    const vec4 quarter = half;
#endif
    const vec4 pair = quarter + __builtin_shufflevector(quarter, quarter, 2, 3, 2, 3);
    return pair[0] + pair[1];
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

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
