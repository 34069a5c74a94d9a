// How activations lie in memory: as float, or as bfloat16, the upper half of one. Arithmetic knows float alone: values
// are widened as they are loaded and rounded as they are stored.
#pragma once
#include "api.h"
#include "simd.h"

namespace sparse_ft {

// Calls body with a value of the type that elements have.
template <class Body>
decltype(auto) with_element(Element element, const Body& body) {
    return element == Element::kFloat ? body(float{}) : body(Bf16{});
}

namespace SPARSE_FT_ISA {

typedef uint32_t uvec __attribute__((vector_size(kLanes * 4), may_alias));
typedef uint16_t halves __attribute__((vector_size(kLanes * 2), may_alias));
typedef uint16_t halves_u __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));
typedef uint32_t uvec8 __attribute__((vector_size(32), may_alias));
typedef uint16_t halves8 __attribute__((vector_size(16), may_alias));
typedef uint16_t halves8_u __attribute__((vector_size(16), aligned(2), may_alias));

inline vec widen(halves h) {
#if defined(__AVX512F__)
    return reinterpret_cast<vec>(uvec(_mm512_cvtepu16_epi32(__m256i(h))) << 16);
#elif defined(__AVX2__)
    return reinterpret_cast<vec>(uvec(_mm256_cvtepu16_epi32(__m128i(h))) << 16);
#else
    return reinterpret_cast<vec>(__builtin_convertvector(h, uvec) << 16);
#endif
}

// The nearest bfloat16, of two equally near ones the even; NaN stays NaN.
template <class Bits, class Floats>
inline Bits nearest_half(Floats v) {
    const Bits bits = reinterpret_cast<Bits>(v);
    return (v != v ? bits | 0x400000u : bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
}
inline halves narrow(vec v) {
    const uvec bits = nearest_half<uvec>(v);
#if defined(__AVX2__) && !defined(__AVX512F__)
    return halves(_mm_packus_epi32(_mm256_castsi256_si128(__m256i(bits)), _mm256_extracti128_si256(__m256i(bits), 1)));
#else
    return __builtin_convertvector(bits, halves);
#endif
}
#if !defined(__AVX2__) || defined(__AVX512F__)  // otherwise the same types
inline vec8 widen(halves8 h) { return reinterpret_cast<vec8>(__builtin_convertvector(h, uvec8) << 16); }
inline halves8 narrow(vec8 v) { return __builtin_convertvector(nearest_half<uvec8>(v), halves8); }
#endif

// What is left of a value that is stored and loaded again.
template <class T>
inline vec rounded(vec v) {
    if constexpr (sizeof(T) == sizeof(float)) return v;
    return reinterpret_cast<vec>(nearest_half<uvec>(v) << 16);
}

inline float widen(float x) { return x; }
inline float widen(Bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
inline void store_one(float* p, float x) { *p = x; }
inline void store_one(Bf16* p, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    p->bits = uint16_t((x != x ? bits | 0x400000u : bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

inline vec load(const Bf16* p) { return widen(halves(*reinterpret_cast<const halves_u*>(p))); }
inline void store(Bf16* p, vec v) { *reinterpret_cast<halves_u*>(p) = narrow(v); }
inline vec load_some(const Bf16* p, int count) {
#if defined(__AVX512F__)
    return widen(halves(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p)));
#else
    halves h = {};
    std::memcpy(&h, p, size_t(count) * sizeof(Bf16));
    return widen(h);
#endif
}
inline vec load(const Bf16* p, int count) { return count == kLanes ? load(p) : load_some(p, count); }
inline void store(Bf16* p, vec v, int count) {
    if (count == kLanes) return store(p, v);
    const halves h = narrow(v);
#if defined(__AVX512F__)
    _mm256_mask_storeu_epi16(p, __mmask16((1u << count) - 1), __m256i(h));
#else
    std::memcpy(p, &h, size_t(count) * sizeof(Bf16));
#endif
}
inline void store_around(Bf16* p, vec v) {
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), __m256i(narrow(v)));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), __m128i(narrow(v)));
#else
    store(p, v);
#endif
}
inline vec8 load8(const float* p) { return *reinterpret_cast<const vec8_u*>(p); }
inline vec8 load8(const Bf16* p) { return widen(halves8(*reinterpret_cast<const halves8_u*>(p))); }
inline void store8(float* p, vec8 v) { *reinterpret_cast<vec8_u*>(p) = v; }
inline void store8(Bf16* p, vec8 v) { *reinterpret_cast<halves8_u*>(p) = narrow(v); }

// A run of elements as floats.
inline void read_run(const float* from, float* to, int64_t count) {
    std::memcpy(to, from, size_t(count) * sizeof(float));
}
inline void read_run(const Bf16* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    if (i < count) store(to + i, load_some(from + i, int(count - i)), int(count - i));
}

// Whether whole vectors of elements from `p` on can be stored around the caches.
template <class T>
inline bool aligned_for_vectors(const T* p) {
    return reinterpret_cast<uintptr_t>(p) % (kLanes * sizeof(T)) == 0;
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
