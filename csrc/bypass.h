// When results go to memory around the caches, which saves reading the lines that they replace.
#pragma once
#include <algorithm>
#include <type_traits>

#include "api.h"
#include "each_vector.h"
#include "element.h"

namespace sparse_ft {

constexpr int64_t kBypassBytes = 4 << 20;  // a larger result is gone from the caches before it is read again

inline int64_t result_bytes(const Product& q) {
    int64_t positions = 0;
    for (int64_t i = 0; i < q.plane_count; ++i) positions += q.planes[i].height * q.planes[i].width;
    return positions * q.geometry.batch * q.geometry.groups * q.geometry.rows_per_group * element_bytes(q.element);
}

namespace SPARSE_FT_ISA {

// Writes a run of elements, around the caches where that is wanted and the run's place allows it.
template <class To, class From>
inline void write_run(To* to, const From* from, int64_t count, bool around) {
    if constexpr (std::is_same_v<To, Bf16> && std::is_same_v<From, Bf16>)  // bytes are all that moves
        if (count % 2 == 0 && (reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 4 == 0)
            return write_run(reinterpret_cast<float*>(to), reinterpret_cast<const float*>(from), count / 2, around);
    if (count % kLanes == 0 && around && aligned_for_vectors(to)) {
        // Whole lines: a part of one that goes around the caches alone takes several times as long.
        constexpr int64_t kLine = 64 / sizeof(To);
        const int64_t before = int64_t(-reinterpret_cast<uintptr_t>(to) % 64 / sizeof(To));
        const int64_t first = std::min(before, count), last = first + (count - first) / kLine * kLine;
        for (int64_t i = 0; i < first; i += kLanes) store(to + i, load(from + i));
        for (int64_t i = first; i < last; i += kLanes) store_around(to + i, load(from + i));
        for (int64_t i = last; i < count; i += kLanes) store(to + i, load(from + i));
    } else if (count % kLanes == 0) {
        for (int64_t i = 0; i < count; i += kLanes) store(to + i, load(from + i));
    } else if (std::is_same_v<To, From> && count >= 4 * kLanes) {  // fewer are too short for a call
        std::memcpy(to, from, size_t(count) * sizeof(To));
    } else {
        each_vector(count, [&](int64_t i, int n) { store(to + i, load(from + i, n), n); });
    }
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
