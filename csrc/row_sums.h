// Row sums of an output gradient: the gradient of a bias. For products that do not read the gradient in one piece.
#pragma once
#include "element.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

template <class T>
void sum_rows_of(const Product& q, const T* data) {
    const Geometry& g = q.geometry;
    const Plane& p = q.planes[0];
    const View& d = q.grad;
    const int64_t rows = g.groups * g.rows_per_group;
    constexpr int64_t kStrip = 256;  // rows, whose sums stay in the first-level cache
#pragma omp parallel for schedule(static) num_threads(q.threads)
    for (int64_t strip = 0; strip < rows; strip += kStrip) {
        const int64_t count = rows - strip < kStrip ? rows - strip : kStrip;
        double total[kStrip] = {};
        for (int64_t y = 0; y < p.height; ++y)
            for (int64_t x = 0; x < p.width; ++x) {
                const T* from = data + strip * d.c + y * d.y + x * d.x;
                if (d.n == 1) {
                    for (int64_t r = 0; r < count; ++r) {
                        float sum = 0;
                        for (int64_t n = 0; n < g.batch; ++n) sum += widen(from[r * d.c + n]);
                        total[r] += sum;
                    }
                } else {
                    for (int64_t n = 0; n < g.batch; ++n)
                        for (int64_t r = 0; r < count; ++r) total[r] += widen(from[n * d.n + r * d.c]);
                }
            }
        for (int64_t r = 0; r < count; ++r) q.row_sums[strip + r] = float(total[r]);
    }
}

// q.row_sums[r] = sum over samples and positions of G[r].
inline void sum_rows(const Product& q) {
    with_element(q.element, [&](auto element) { sum_rows_of(q, static_cast<const decltype(element)*>(q.grad.data)); });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
