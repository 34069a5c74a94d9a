// When results go to memory around the caches, which saves reading the lines that they replace.
#pragma once
#include "api.h"
#include "each_vector.h"
#include "simd.h"

namespace sparse_ft {

constexpr int64_t kBypassBytes = 4 << 20;  // a larger result is gone from the caches before it is read again

inline int64_t result_bytes(const Product& q) {
    int64_t positions = 0;
    for (int64_t i = 0; i < q.plane_count; ++i) positions += q.planes[i].height * q.planes[i].width;
    return positions * q.geometry.batch * q.geometry.groups * q.geometry.rows_per_group * 4;
}

namespace SPARSE_FT_ISA {

// Writes a run of floats, around the caches where that is wanted and the run's place allows it.
inline void write_run(float* to, const float* from, int64_t count, bool around) {
    if (count < 4 * kLanes && count % kLanes != 0)  // too short for a call
        each_vector(count, [&](int64_t i, int n) { store(to + i, load(from + i, n), n); });
    else if (count % kLanes != 0 || (around && reinterpret_cast<uintptr_t>(to) % sizeof(vec) != 0))
        std::memcpy(to, from, size_t(count) * sizeof(float));
    else if (around)
        for (int64_t i = 0; i < count; i += kLanes) store_around(to + i, load(from + i));
    else
        for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(from + i));
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
