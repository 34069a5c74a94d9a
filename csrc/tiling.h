// How a product is cut into tiles, and where a tap lies in a packed panel. No arithmetic on floats.
//
// A tile is `rows` x `cols` positions x `lanes` samples. Its panel holds every source value that the
// tile needs, packed as [channel][row phase][row][column phase][column][lane]: steps of the stride
// are resolved into phases and zero padding into zeros while packing, so that every tap of every
// position row is one contiguous run of cols * lanes floats.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "api.h"

namespace sparse_ft {

// One axis of a plane's taps: which residues modulo the step occur, and the place of each tap.
struct Axis {
    std::vector<int32_t> phases;      // residues in use, ascending
    std::vector<int32_t> phase, hop;  // per tap: index into phases; positions beyond the tile's first
    int64_t origin = 0;               // source coordinate of residue 0 at position 0
    int64_t reach = 0;                // largest hop
    int64_t step = 1;

    Axis(const int32_t* taps, int64_t count, int64_t step_) : phase(count, -1), hop(count, 0), step(step_) {
        int32_t low = INT32_MAX;
        for (int64_t k = 0; k < count; ++k)
            if (taps[k] != kNoTap) low = std::min(low, taps[k]);
        if (low == INT32_MAX) return;
        origin = low;
        for (int64_t k = 0; k < count; ++k)
            if (taps[k] != kNoTap) phases.push_back(int32_t((taps[k] - low) % step));
        std::sort(phases.begin(), phases.end());
        phases.erase(std::unique(phases.begin(), phases.end()), phases.end());
        for (int64_t k = 0; k < count; ++k) {
            if (taps[k] == kNoTap) continue;
            const int32_t residue = int32_t((taps[k] - low) % step);
            phase[k] = int32_t(std::lower_bound(phases.begin(), phases.end(), residue) - phases.begin());
            hop[k] = int32_t((taps[k] - low) / step);
            reach = std::max<int64_t>(reach, hop[k]);
        }
    }
    int64_t phase_count() const { return int64_t(phases.size()); }
    // Source coordinate of panel entry (phase index, i) for a tile that starts at position `first`.
    int64_t source(int64_t first, int64_t phase_index, int64_t i) const {
        return (first + i) * step + origin + phases[phase_index];
    }
};

struct Tiling {
    static constexpr int64_t kMaxChannelFloats = int64_t(1) << 28;  // and so offsets fit in 32 bits

    Axis y, x;
    int64_t lanes, cols, rows;                          // of a full tile
    int64_t panel_cols, panel_rows;                     // per phase
    int64_t column_stride, row_stride, channel_stride;  // floats in the panel
    int64_t block_channels;  // channels of one panel; a reduction over more is done in blocks
    int64_t blocks;          // per group chunk
    int64_t groups_per_chunk, chunks;
    int64_t batch_tiles, y_tiles, x_tiles;

    // `width`: vectors of a tile times lanes of a vector; `budget`: bytes of a panel.
    Tiling(const Geometry& g, const Plane& p, int64_t max_lanes, int64_t budget)
        : y(p.tap_y, g.taps_h, g.step_y), x(p.tap_x, g.taps_w, g.step_x) {
        lanes = std::min(g.batch, max_lanes);
        batch_tiles = (g.batch + lanes - 1) / lanes;
        const int64_t wanted = std::clamp<int64_t>(max_lanes / lanes, 1, std::max<int64_t>(p.width, 1));
        x_tiles = (std::max<int64_t>(p.width, 1) + wanted - 1) / wanted;
        cols = (std::max<int64_t>(p.width, 1) + x_tiles - 1) / x_tiles;
        x_tiles = (p.width + cols - 1) / cols;
        rows = 1;
        const int64_t channels = g.channels_per_group;
        auto bytes = [&](int64_t r, int64_t ch) {
            return ch * y.phase_count() * (r + y.reach) * x.phase_count() * (cols + x.reach) * lanes * 4;
        };
        while (rows < std::min<int64_t>(p.height, 8) && bytes(rows + 1, channels) <= budget) ++rows;
        rows = std::max<int64_t>(1, std::min(rows, p.height));
        const int64_t y_count = (p.height + rows - 1) / std::max<int64_t>(rows, 1);
        if (y_count > 0) rows = (p.height + y_count - 1) / y_count;
        y_tiles = y_count;
        panel_cols = cols + x.reach;
        panel_rows = rows + y.reach;
        column_stride = lanes;
        row_stride = std::max<int64_t>(x.phase_count(), 1) * panel_cols * lanes;
        channel_stride = std::max<int64_t>(y.phase_count(), 1) * panel_rows * row_stride;
        if (channel_stride > kMaxChannelFloats)
            throw std::length_error(
                "dilation times kernel size is too large: one channel of a tile takes over a gigabyte");
        const int64_t fit = std::max<int64_t>(1, budget / 4 / std::max<int64_t>(channel_stride, 1));
        if (fit >= channels) {
            block_channels = channels;
            blocks = 1;
            groups_per_chunk = std::clamp<int64_t>(fit / std::max<int64_t>(channels, 1), 1, g.groups);
        } else {
            blocks = (channels + fit - 1) / fit;
            block_channels = (channels + blocks - 1) / blocks;
            blocks = (channels + block_channels - 1) / block_channels;
            groups_per_chunk = 1;
        }
        chunks = (g.groups + groups_per_chunk - 1) / groups_per_chunk;
    }
    int64_t tiles() const { return batch_tiles * y_tiles * x_tiles; }
    int64_t panel_floats() const { return groups_per_chunk * block_channels * channel_stride; }
    int64_t tap_offset(int64_t ky, int64_t kx) const {  // negative: the tap is not in this plane
        if (y.phase[ky] < 0 || x.phase[kx] < 0) return -1;
        return (y.phase[ky] * panel_rows + y.hop[ky]) * row_stride +
               (x.phase[kx] * panel_cols + x.hop[kx]) * column_stride;
    }
};

}  // namespace sparse_ft
