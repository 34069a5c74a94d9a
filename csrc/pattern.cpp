// Building a pattern from a dense weight or a mask, its transpose, and its validation.
#include <algorithm>
#include <cstring>
#include <omp.h>
#include <vector>

#include "api.h"

namespace sparse_ft {
namespace {

template <class T>
int64_t count(const T* data, int64_t numel, int threads) {
    int64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : total)
    for (int64_t i = 0; i < numel; ++i) total += data[i] != T(0);
    return total;
}

// Branch-free compaction: at 90 % sparsity a branch per element would be mispredicted once a nonzero.
template <class T>
int64_t compact(const T* row, int64_t cols, int32_t* to) {
    int64_t n = 0;
    for (int64_t k = 0; k < cols; ++k) {
        to[n] = int32_t(k);
        n += row[k] != T(0);
    }
    return n;
}

template <class T>
void fill_rows(const T* data, const float* weight, int64_t rows, int64_t cols, int32_t* row_ptr, int32_t* col,
               float* values, int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) row_ptr[r + 1] = int32_t(count(data + r * cols, cols, 1));
#pragma omp single
        {
            row_ptr[0] = 0;
            for (int64_t r = 0; r < rows; ++r) row_ptr[r + 1] += row_ptr[r];
        }
        std::vector<int32_t> found(static_cast<size_t>(cols) + 1);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t n = compact(data + r * cols, cols, found.data());
            const int64_t start = row_ptr[r];
            if (n > 0) std::memcpy(col + start, found.data(), size_t(n) * sizeof(int32_t));
            if (values)
                for (int64_t i = 0; i < n; ++i) values[start + i] = weight[r * cols + found[size_t(i)]];
        }
    }
}

int64_t phase(int64_t tap, int64_t dilation, int64_t padding, int64_t stride) {
    return ((tap * dilation - padding) % stride + stride) % stride;
}

}  // namespace

int64_t count_nonzero(const float* weight, int64_t numel, int threads) { return count(weight, numel, threads); }
int64_t count_true(const uint8_t* mask, int64_t numel, int threads) { return count(mask, numel, threads); }

void build_rows(const float* weight, const uint8_t* mask, int64_t rows, int64_t cols, int32_t* row_ptr, int32_t* col,
                float* values, int threads) {
    if (mask)
        fill_rows(mask, weight, rows, cols, row_ptr, col, weight ? values : nullptr, threads);
    else
        fill_rows(weight, weight, rows, cols, row_ptr, col, values, threads);
}

void build_transpose(const PatternShape& s, const int32_t* row_ptr, const int32_t* col, int32_t* t_row_ptr,
                     int32_t* t_col, int32_t* perm, int threads) {
    // A counting sort by (phase of the tap, input channel). Rows are read in order, so entries of one
    // transposed row come out by ascending output channel, and by ascending tap within one channel. Each thread has
    // some rows, and in every transposed row a place after the threads before it.
    const int64_t taps = s.kernel_h * s.kernel_w, per_group = s.out_channels / s.groups;
    const int64_t channels = s.in_per_group * s.groups, rows = s.stride_y * s.stride_x * channels;
    std::vector<int32_t> tap_row(static_cast<size_t>(taps));  // first transposed row of the tap's phase
    for (int64_t k = 0; k < taps; ++k)
        tap_row[size_t(k)] = int32_t((phase(k / s.kernel_w, s.dilation_y, s.padding_y, s.stride_y) * s.stride_x +
                                      phase(k % s.kernel_w, s.dilation_x, s.padding_x, s.stride_x)) *
                                     channels);
    // Per column index, the transposed row (without the group's first channel) and the tap: no division per entry.
    std::vector<int32_t> to_row(static_cast<size_t>(s.in_per_group * taps)), to_tap(to_row.size());
    for (int64_t c = 0, i = 0; c < s.in_per_group; ++c)
        for (int64_t k = 0; k < taps; ++k, ++i) {
            to_row[size_t(i)] = tap_row[size_t(k)] + int32_t(c);
            to_tap[size_t(i)] = int32_t(k);
        }
    std::vector<int32_t> places(static_cast<size_t>(threads * rows), 0);  // by thread: counts, then where to go on
#pragma omp parallel num_threads(threads)
    {
        const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        const int64_t begin = s.out_channels * part / parts, end = s.out_channels * (part + 1) / parts;
        int32_t* const own = places.data() + part * rows;
        for (int64_t o = begin; o < end; ++o) {
            int32_t* count = own + o / per_group * s.in_per_group;
            for (int32_t j = row_ptr[o]; j < row_ptr[o + 1]; ++j) ++count[to_row[size_t(col[j])]];
        }
#pragma omp barrier
#pragma omp single
        {
            int32_t total = 0;
            for (int64_t r = 0; r < rows; ++r) {
                t_row_ptr[r] = total;
                for (int64_t p = 0; p < parts; ++p) {
                    const int32_t count = places[size_t(p * rows + r)];
                    places[size_t(p * rows + r)] = total;
                    total += count;
                }
            }
            t_row_ptr[rows] = total;
        }
        for (int64_t o = begin; o < end; ++o) {
            int32_t* place = own + o / per_group * s.in_per_group;
            const int32_t base = int32_t(o % per_group * taps);
            for (int32_t j = row_ptr[o]; j < row_ptr[o + 1]; ++j) {
                const size_t k = size_t(col[j]);
                const int32_t at = place[to_row[k]]++;
                t_col[at] = base + to_tap[k];
                perm[at] = j;
            }
        }
    }
}

uint64_t fingerprint(const int32_t* values, int64_t count) {
    // Four independent multiply-and-rotate chains over pairs of values keep the multiplier busy.
    constexpr uint64_t kPrime = 0x9E3779B97F4A7C15u;
    uint64_t chain[4] = {kPrime, 2 * kPrime, 3 * kPrime, uint64_t(count) * kPrime};
    auto mix = [](uint64_t state, uint64_t value) {
        state = (state ^ value) * kPrime;
        return state ^ state >> 29;
    };
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
        for (int k = 0; k < 4; ++k) {
            uint64_t pair;
            std::memcpy(&pair, values + i + 2 * k, sizeof pair);
            chain[k] = mix(chain[k], pair);
        }
    for (; i < count; ++i) chain[0] = mix(chain[0], uint32_t(values[i]));
    for (int k = 1; k < 4; ++k) chain[0] = mix(chain[0], chain[k]);
    return chain[0];
}

const char* validate_rows(const int32_t* row_ptr, int64_t rows, const int32_t* col, int64_t nnz, int64_t cols) {
    if (row_ptr[0] != 0 || row_ptr[rows] != nnz)
        return "row pointers do not start at 0 and end at the number of nonzeros";
    for (int64_t r = 0; r < rows; ++r) {
        if (row_ptr[r + 1] < row_ptr[r] || row_ptr[r + 1] > nnz)
            return "row pointers are not ascending within the number of nonzeros";
        int32_t before = -1;
        for (int32_t j = row_ptr[r]; j < row_ptr[r + 1]; ++j) {
            if (col[j] <= before || col[j] >= cols)
                return "column indices are out of range or not ascending within a row";
            before = col[j];
        }
    }
    return nullptr;
}

}  // namespace sparse_ft
