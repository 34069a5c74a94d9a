// When results go to memory around the caches, which saves reading the lines that they replace.
#pragma once
#include "api.h"

namespace sparse_ft {

constexpr int64_t kBypassBytes = 4 << 20;  // a larger result is gone from the caches before it is read again

inline int64_t result_bytes(const Product& q) {
    int64_t positions = 0;
    for (int64_t i = 0; i < q.plane_count; ++i) positions += q.planes[i].height * q.planes[i].width;
    return positions * q.geometry.batch * q.geometry.groups * q.geometry.rows_per_group * 4;
}

}  // namespace sparse_ft
