// What the two generated products share: tiles, packing, and when they pay.
#pragma once
#include "panel.h"
#include "transpose16.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

constexpr int64_t kGeneratedPanel = 448 << 10;  // bytes: most of it stays in the second-level cache
constexpr int64_t kRunVectors = 32;             // of a tile row, at most

// Vectors of a tile row: the code steps from one to the next.
struct Run {
    int64_t floats, vectors, step;  // step: floats in the panel
    Run(const Tiling& t, const Tile& tile)
        : floats(t.group_stride > 0 || tile.cols == 1 ? tile.lanes : tile.cols * t.lanes),
          vectors((floats + kLanes - 1) / kLanes),
          step(t.group_stride > 0 ? t.group_stride : kLanes) {}
};

inline TileLimits generated_limits(const Product& q) {
    const Geometry& g = q.geometry;
    const int64_t vector_bytes = g.groups * g.channels_per_group * kLanes * 4;
    if (q.source.n != 1) {  // token-major
        const int64_t vectors = std::clamp<int64_t>(kGeneratedPanel / vector_bytes, 8, kRunVectors);
        return {vectors * kLanes, vectors * kLanes, 1, kGeneratedPanel, false, kLanes};
    }
    int64_t positions = 0;
    for (int64_t i = 0; i < q.plane_count; ++i)
        positions = std::max(positions, q.planes[i].height * q.planes[i].width);
    if (positions <= 1) {
        const int64_t vectors = std::clamp<int64_t>(kGeneratedPanel / vector_bytes, 4, kRunVectors);
        return {vectors * kLanes, vectors * kLanes, 1, kGeneratedPanel};
    }
    return {std::min<int64_t>(g.batch, 16 * kLanes), kRunVectors * kLanes, 64, kGeneratedPanel, true};
}

inline void pack(const Tiling& t, const Tile& tile, const Geometry& g, const View& s, int64_t channel, int64_t count,
                 float* panel) {
    if (t.group_stride == 0) return pack_panel(t, tile, g, s, channel, count, panel);
    const int64_t x = t.x.source(0, 0, 0), y = t.y.source(0, 0, 0);  // a linear layer has one position
    for (int64_t n = 0; n < tile.lanes; n += kLanes, panel += t.group_stride)
        for (int64_t c = 0; c < count; c += 16)
            transpose16(s.data + channel + c + y * s.y + x * s.x + (tile.n + n) * s.n, s.n,
                        std::min<int64_t>(kLanes, tile.lanes - n), panel + c * kLanes, kLanes,
                        std::min<int64_t>(16, count - c), true);
}

// Code pays where its loads are shared by several rows, and where there are lanes enough to run it over.
inline bool worth_generating(const Product& q) {
    const Geometry& g = q.geometry;
    int64_t lanes = 0;
    for (int64_t i = 0; i < q.plane_count; ++i) lanes += q.planes[i].height * q.planes[i].width * g.batch;
    return q.programs != nullptr && g.rows_per_group >= 8 && lanes >= 4 * kLanes && q.nnz > 0;
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
