// Strided batched transposes: NCHW or channels-last <-> batch-last.
#include <omp.h>

#include "api.h"
#include "simd.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

void transpose_batches(const Transpose& q) {
    // Long matrices are cut into strips of columns, so that every thread has work and a strip's
    // lines stay in cache.
    constexpr int64_t kStrip = 512;
    const int64_t strips = (q.cols + kStrip - 1) / kStrip;
    const int64_t batches = q.batch_outer * q.batch_inner;
#pragma omp parallel for schedule(static) num_threads(q.threads)
    for (int64_t i = 0; i < batches * strips; ++i) {
        const int64_t batch = i / strips, strip = i % strips;
        const int64_t outer = batch / q.batch_inner, inner = batch % q.batch_inner;
        const int64_t col = strip * kStrip, count = q.cols - col < kStrip ? q.cols - col : kStrip;
        transpose(q.from + outer * q.from_outer + inner * q.from_inner + col, q.from_row,
                  q.to + outer * q.to_outer + inner * q.to_inner + col * q.to_col, q.to_col, q.rows, count);
    }
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
