// Transposes: to[j * to_stride + i] = from[i * from_stride + j].
#pragma once
#include <algorithm>

#include "element.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

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

#if defined(__AVX512F__)

inline vec load_masked(const float* p, __mmask16 mask) { return vec(_mm512_maskz_loadu_ps(mask, p)); }
inline vec load_masked(const Bf16* p, __mmask16 mask) { return widen(halves(_mm256_maskz_loadu_epi16(mask, p))); }
inline void store_masked(float* p, vec v, __mmask16 mask) { _mm512_mask_storeu_ps(p, mask, __m512(v)); }
inline void store_masked(Bf16* p, vec v, __mmask16 mask) { _mm256_mask_storeu_epi16(p, mask, __m256i(narrow(v))); }

// Of i < rows and j < cols, both at most 16, in registers. With `fill`, rows up to 16 are written as zeros. With
// `around`, whole, aligned vectors are written around the caches, if they are whole lines.
template <class From, class To>
inline void transpose16(const From* from, int64_t from_stride, int64_t rows, To* to, int64_t to_stride, int64_t cols,
                        bool fill, bool around = false) {
    const __mmask16 read = __mmask16((1u << cols) - 1), write = fill ? __mmask16(~0u) : __mmask16((1u << rows) - 1);
    vec a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = i < rows ? load_masked(from + i * from_stride, read) : vec{};
    for (int i = 0; i < 16; i += 2) {  // pairs of rows: floats interleaved within quarters
        b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
        b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    for (int i = 0; i < 16; i += 4)  // fours of rows: column 4q + k of them is quarter q of a[i + k]
        for (int k = 0; k < 2; ++k) {
            const vec u = b[i + k], v = b[i + 2 + k];
            a[i + 2 * k] = __builtin_shufflevector(u, v, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
            a[i + 2 * k + 1] =
                __builtin_shufflevector(u, v, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
        }
    auto even = [](vec u, vec v) {  // quarters 0 and 2 of both
        return __builtin_shufflevector(u, v, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    };
    auto odd = [](vec u, vec v) {
        return __builtin_shufflevector(u, v, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    };
    for (int k = 0; k < 4; ++k) {
        const vec even0 = even(a[k], a[4 + k]), odd0 = odd(a[k], a[4 + k]);
        const vec even1 = even(a[8 + k], a[12 + k]), odd1 = odd(a[8 + k], a[12 + k]);
        b[k] = even(even0, even1);
        b[4 + k] = even(odd0, odd1);
        b[8 + k] = odd(even0, even1);
        b[12 + k] = odd(odd0, odd1);
    }
    if (sizeof(To) == sizeof(float) && around && rows == 16 &&
        (reinterpret_cast<uintptr_t>(to) | uintptr_t(to_stride) * 4) % sizeof(vec) == 0)
        for (int j = 0; j < cols; ++j) store_around(to + j * to_stride, b[j]);
    else
        for (int j = 0; j < cols; ++j) store_masked(to + j * to_stride, b[j], write);
}

template <class From, class To>
inline void transpose(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t rows, int64_t cols) {
    for (int64_t j = 0; j < cols; j += 16)
        for (int64_t i = 0; i < rows; i += 16)
            transpose16(from + i * from_stride + j, from_stride, std::min<int64_t>(16, rows - i),
                        to + j * to_stride + i, to_stride, std::min<int64_t>(16, cols - j), false);
}

#else

// Sixteen columns at a time over all
// rows: a read line is used whole at once, which matters where the row stride puts all rows into one cache set.
template <class From, class To>
inline void transpose(const From* from, int64_t from_stride, To* to, int64_t to_stride, int64_t rows, int64_t cols) {
    constexpr int64_t kStrip = 16;
    for (int64_t strip = 0; strip < cols; strip += kStrip) {
        const int64_t end = strip + kStrip < cols ? strip + kStrip : cols;
        int64_t i = 0;
        for (; i + 8 <= rows; i += 8) {
            int64_t j = strip;
            for (; j + 8 <= end; j += 8) {
                vec8 block[8];
                for (int k = 0; k < 8; ++k) block[k] = load8(from + (i + k) * from_stride + j);
                transpose8(block);
                for (int k = 0; k < 8; ++k) store8(to + (j + k) * to_stride + i, block[k]);
            }
            for (; j < end; ++j)
                for (int k = 0; k < 8; ++k)
                    store_one(to + j * to_stride + i + k, widen(from[(i + k) * from_stride + j]));
        }
        for (; i < rows; ++i)
            for (int64_t j = strip; j < end; ++j) store_one(to + j * to_stride + i, widen(from[i * from_stride + j]));
    }
}

#endif

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
