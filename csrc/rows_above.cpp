// The rows of a pattern straight from a dense weight: its entries whose magnitude reaches a threshold.
#include <algorithm>
#include <cstring>
#include <omp.h>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

// The bits of a magnitude, as an integer, are in the order of its value; those of NaN are the largest.
inline int32_t bits_of_magnitude(float x) {
    int32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffff;
}

// By column, the least bits that count. Zero never does, and nothing in a column that is left out (but for one of the
// NaNs).
std::vector<int32_t> least_bits(const RowsAbove& q) {
    std::vector<int32_t> least(size_t(q.cols), std::max(1, bits_of_magnitude(q.threshold)));
    if (q.taps)
        for (int64_t k = 0; k < q.cols; ++k)
            if (!q.taps[k % q.tap_count]) least[size_t(k)] = INT32_MAX;
    return least;
}

inline int32_t count_row(const float* row, const int32_t* least, int64_t cols) {
    int32_t count = 0;
    for (int64_t k = 0; k < cols; ++k) count += bits_of_magnitude(row[k]) >= least[k];
    return count;
}

// The `count` entries of a row. There is memory for `room`, of which those after `count` are other rows that follow.
inline void fill_row(const float* row, const int32_t* least, int64_t cols, int32_t* col, float* values, int64_t count,
                     [[maybe_unused]] int64_t room) {
    int64_t k = 0;
#if defined(__AVX512F__)
    // Whole vectors are stored, of which the next overwrites what is too much.
    const int32_t* const end = col + count;
    const int32_t* const last = col + room;
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff), step = _mm512_set1_epi32(16);
    __m512i column = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; k + 16 <= cols && last - col >= 16; k += 16) {
        const __m512i bits = _mm512_loadu_si512(row + k);
        const __mmask16 above =
            _mm512_cmpge_epi32_mask(_mm512_and_si512(bits, magnitude), _mm512_loadu_si512(least + k));
        _mm512_storeu_si512(col, _mm512_maskz_compress_epi32(above, column));
        _mm512_storeu_si512(values, _mm512_maskz_compress_epi32(above, bits));
        const int found = __builtin_popcount(above);
        col += found;
        values += found;
        column = _mm512_add_epi32(column, step);
    }
    count = end - col;
#endif
    for (int64_t i = 0; i < count && k < cols; ++k) {  // without a branch an entry, which would be mispredicted
        col[i] = int32_t(k);
        values[i] = row[k];
        i += bits_of_magnitude(row[k]) >= least[k];
    }
}

}  // namespace

int64_t count_rows_above(const RowsAbove& q, int32_t* row_ptr) {
    const std::vector<int32_t> least = least_bits(q);
#pragma omp parallel for schedule(static) num_threads(q.threads)
    for (int64_t r = 0; r < q.rows; ++r) row_ptr[r + 1] = count_row(q.weight + r * q.cols, least.data(), q.cols);
    int64_t count = 0;
    row_ptr[0] = 0;
    for (int64_t r = 0; r < q.rows; ++r) row_ptr[r + 1] = int32_t(count += row_ptr[r + 1]);
    return count;
}

void fill_rows_above(const RowsAbove& q, const int32_t* row_ptr, int32_t* col, float* values) {
    const std::vector<int32_t> least = least_bits(q);
#pragma omp parallel num_threads(q.threads)
    {
        const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        const int64_t begin = q.rows * part / parts, end = q.rows * (part + 1) / parts;
        for (int64_t r = begin; r < end; ++r)
            fill_row(q.weight + r * q.cols, least.data(), q.cols, col + row_ptr[r], values + row_ptr[r],
                     row_ptr[r + 1] - row_ptr[r], row_ptr[end] - row_ptr[r]);
    }
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
