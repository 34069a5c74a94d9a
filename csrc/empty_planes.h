// Planes without a nonzero: the input gradient of a stride larger than the kernel has them (a 1x1 convolution of
// stride 2 reads a quarter of its input). They are zeros, written at the speed of memory.
#pragma once
#include <algorithm>
#include <vector>

#include "bypass.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

template <class T>
void clear_plane(const Product& q, const Plane& p) {
    const Geometry& g = q.geometry;
    const View& d = q.dest;
    const int64_t channels = g.groups * g.rows_per_group;
    // Positions that follow one another are one run of zeros.
    const bool joined = d.x * g.dest_step_x == g.batch;
    const int64_t runs = joined ? 1 : p.width, length = joined ? p.width * g.batch : g.batch;
    const bool around = length * sizeof(T) % 64 == 0 && (d.c | d.y | d.x) % kLanes == 0 &&
                        aligned_for_vectors(static_cast<T*>(d.data)) && result_bytes(q) > kBypassBytes;
#pragma omp parallel num_threads(q.threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t y = 0; y < p.height; ++y) {
                T* to = static_cast<T*>(d.data) + c * d.c + (p.dest_y + y * g.dest_step_y) * d.y + p.dest_x * d.x;
                for (int64_t i = 0; i < runs; ++i, to += d.x * g.dest_step_x) {
                    if (around)
                        for (int64_t k = 0; k < length; k += kLanes) store_around(to + k, vec{});
                    else
                        std::fill(to, to + length, T{});
                }
            }
        if (around) finish_stores_around();
    }
}

// Calls run(product) with the planes that hold nonzeros, after clearing the others.
template <class Run>
const char* clearing_empty_planes(const Product& product, Run run) {
    if (product.plane_count == 1 || product.dest.n != 1 || product.bias != nullptr) return run(product);
    const int64_t rows = product.geometry.groups * product.geometry.rows_per_group;
    std::vector<Plane> full, empty;
    for (int64_t i = 0; i < product.plane_count; ++i) {
        const int32_t* row_ptr = product.planes[i].row_ptr;
        const bool none = std::all_of(row_ptr, row_ptr + rows + 1, [&](int32_t at) { return at == row_ptr[0]; });
        (none ? empty : full).push_back(product.planes[i]);
    }
    if (full.empty() || empty.empty()) return run(product);
    Product rest = product;
    rest.planes = full.data();
    rest.plane_count = int64_t(full.size());
    if (const char* problem = run(rest)) return problem;
    with_element(product.element, [&](auto element) {
        for (const Plane& plane : empty) clear_plane<decltype(element)>(product, plane);
    });
    return nullptr;
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
