// A run of floats, vector by vector.
#pragma once
#include "simd.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

// step(i, count) for each vector of a run; count is a constant but for the last.
template <class Step>
inline void each_vector(int64_t size, Step step) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) step(i, kLanes);
    if (i < size) step(i, int(size - i));
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
