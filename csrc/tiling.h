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
    // Phases of taps that have no place in the panel.
    static constexpr int32_t kAbsent = -1;   // the tap does not belong to the plane
    static constexpr int32_t kOutside = -2;  // it reads nothing but padding, from whatever position

    std::vector<int32_t> phases;      // residues in use, ascending
    std::vector<int32_t> phase, hop;  // per tap: index into phases; positions beyond the tile's first
    int64_t origin = 0;               // source coordinate of residue 0 at position 0
    int64_t reach = 0;                // largest hop
    int64_t step = 1;

    // Of `positions` over a source of `size`; `drop`: whether taps that read nothing but padding get no place.
    Axis(const int32_t* taps, int64_t count, int64_t step_, int64_t positions, int64_t size, bool drop)
        : phase(count, kAbsent), hop(count, 0), step(step_) {
        int32_t low = INT32_MAX;
        for (int64_t k = 0; k < count; ++k) {
            if (taps[k] == kNoTap) continue;
            phase[k] = drop && !reads(taps[k], positions, size) ? kOutside : 0;
            if (phase[k] == 0) low = std::min(low, taps[k]);
        }
        if (low == INT32_MAX) return;
        origin = low;
        for (int64_t k = 0; k < count; ++k)
            if (phase[k] >= 0) phases.push_back(int32_t((taps[k] - low) % step));
        std::sort(phases.begin(), phases.end());
        phases.erase(std::unique(phases.begin(), phases.end()), phases.end());
        for (int64_t k = 0; k < count; ++k) {
            if (phase[k] < 0) continue;
            const int32_t residue = int32_t((taps[k] - low) % step);
            phase[k] = int32_t(std::lower_bound(phases.begin(), phases.end(), residue) - phases.begin());
            hop[k] = int32_t((taps[k] - low) / step);
            reach = std::max<int64_t>(reach, hop[k]);
        }
    }
    int64_t phase_count() const { return int64_t(phases.size()); }
    // Of the taps that belong to the plane, the share that has a place.
    double share() const {
        const auto outside = std::count(phase.begin(), phase.end(), kOutside);
        const auto present = int64_t(phase.size()) - std::count(phase.begin(), phase.end(), kAbsent);
        return present > 0 ? double(present - outside) / double(present) : 1.0;
    }
    // Source coordinate of panel entry (phase index, i) for a tile that starts at position `first`.
    int64_t source(int64_t first, int64_t phase_index, int64_t i) const {
        return (first + i) * step + origin + phases[phase_index];
    }

  private:
    bool reads(int64_t tap, int64_t positions, int64_t size) const {
        const int64_t first = tap >= 0 ? 0 : (-tap + step - 1) / step;  // position that is not before the source
        return first < positions && tap + first * step < size;
    }
};

struct TileLimits {
    int64_t lanes;        // samples of a tile
    int64_t run;          // samples times columns
    int64_t rows;         // of positions
    int64_t bytes;        // of a panel
    bool square = false;  // as few columns as make the least halo, rather than as many as `run` allows
    int64_t vector = 0;   // a lone position's samples in interleaved groups of so many: [group][channel][sample]
    bool drop = false;    // taps that read nothing but padding get no place in the panel
    bool odd = false;     // channels lie an odd number of cache lines apart, and so spread over all sets of a cache
    int64_t part = 0;     // `lanes` may be halved, and again, while they are a multiple of twice this; 0: never
};

struct Tiling {
    static constexpr int64_t kMaxChannelFloats = int64_t(1) << 28;  // and so offsets fit in 32 bits

    Axis y, x;
    int64_t lanes, cols, rows;                          // of a full tile
    int64_t panel_cols, panel_rows;                     // per phase
    int64_t column_stride, row_stride, channel_stride;  // floats in the panel
    int64_t group_stride = 0;                           // of interleaved samples; otherwise unused
    int64_t block_channels;  // channels of one panel; a reduction over more is done in blocks
    int64_t blocks;          // per group chunk
    int64_t groups_per_chunk, chunks;
    int64_t batch_tiles, y_tiles, x_tiles;

    Tiling(const Geometry& g, const Plane& p, const TileLimits& limits)
        : y(p.tap_y, g.taps_h, g.step_y, p.height, g.source_h, limits.drop),
          x(p.tap_x, g.taps_w, g.step_x, p.width, g.source_w, limits.drop) {
        choose_extents(g, p, limits);
        panel_cols = cols + x.reach;
        panel_rows = rows + y.reach;
        column_stride = lanes;
        row_stride = std::max<int64_t>(x.phase_count(), 1) * panel_cols * lanes;
        channel_stride = std::max<int64_t>(y.phase_count(), 1) * panel_rows * row_stride;
        constexpr int64_t kLine = 64 / sizeof(float);
        if (limits.odd && channel_stride % (2 * kLine) == 0) channel_stride += kLine;
        if (channel_stride > kMaxChannelFloats)
            throw std::length_error(
                "dilation times kernel size is too large: one channel of a tile takes over a gigabyte");
        const int64_t channels = g.channels_per_group;
        const int64_t fit = std::max<int64_t>(1, limits.bytes / 4 / std::max<int64_t>(channel_stride, 1));
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
        if (limits.vector > 0) {
            channel_stride = limits.vector;
            group_stride = groups_per_chunk * block_channels * limits.vector;
        }
    }
    // Samples, columns and rows of a tile; the latter are evened out over the plane.
    void choose_extents(const Geometry& g, const Plane& p, const TileLimits& limits) {
        const int64_t width = std::max<int64_t>(p.width, 1), height = std::max<int64_t>(p.height, 1);
        const auto parts = [](int64_t size, int64_t part) { return (size + part - 1) / part; };
        const auto even = [&](int64_t size, int64_t limit) { return parts(size, parts(size, limit)); };
        constexpr double kPiece = 8;  // floats that could be packed while one more piece is begun
        double least = 0;
        const int64_t most = std::clamp<int64_t>(g.batch, 1, limits.lanes);  // no sample: no division by zero
        for (int64_t samples = most;; samples /= 2) {
            const int64_t bytes = g.channels_per_group * samples * 4;  // of one panel entry over all channels
            const int64_t widest = std::clamp<int64_t>(limits.run / samples, 1, width);
            for (int64_t limit = limits.square ? 1 : widest; limit <= widest; ++limit) {
                const int64_t c = even(width, limit);
                const int64_t line = y.phase_count() * x.phase_count() * (c + x.reach) * bytes;
                int64_t r = std::clamp<int64_t>(limits.bytes / std::max<int64_t>(line, 1) - y.reach, 1,
                                                std::min(height, limits.rows));
                r = even(height, r);
                // What is packed for a position, in pieces where a tile has some of the samples, and the fixed cost of
                // a row of positions.
                const double packed_rows = double(height + parts(height, r) * y.reach) / double(height);
                const double packed_cols = double(width + parts(width, c) * x.reach) / double(width);
                const double pieces = samples < g.batch ? kPiece / double(samples) : 0.0;
                const double cost = packed_rows * packed_cols * (1.0 + pieces) + 8.0 / double(c * samples);
                if (least > 0 && cost >= least) continue;
                least = cost;
                lanes = samples;
                cols = c;
                rows = r;
            }
            if (limits.part == 0 || samples % (2 * limits.part) != 0) break;
        }
        batch_tiles = (g.batch + lanes - 1) / lanes;
        x_tiles = (p.width + cols - 1) / cols;
        y_tiles = (p.height + rows - 1) / rows;
    }
    int64_t tiles() const { return batch_tiles * y_tiles * x_tiles; }
    int64_t panel_floats() const {
        const int64_t channels = groups_per_chunk * block_channels;
        return group_stride > 0 ? (lanes + channel_stride - 1) / channel_stride * group_stride
                                : channels * channel_stride;
    }
    // Everything that the offsets within a panel depend on.
    std::vector<int64_t> key(const Geometry& g) const {
        std::vector<int64_t> numbers{g.groups,       g.rows_per_group, g.channels_per_group,
                                     channel_stride, group_stride,     block_channels,
                                     blocks,         groups_per_chunk, row_stride};
        for (int64_t ky = 0; ky < g.taps_h; ++ky)
            for (int64_t kx = 0; kx < g.taps_w; ++kx) numbers.push_back(tap_offset(ky, kx));
        return numbers;
    }
    int64_t tap_offset(int64_t ky, int64_t kx) const {  // negative: Axis's reason for its having no place
        if (y.phase[ky] == Axis::kAbsent || x.phase[kx] == Axis::kAbsent) return Axis::kAbsent;
        if (y.phase[ky] < 0 || x.phase[kx] < 0) return Axis::kOutside;
        return (y.phase[ky] * panel_rows + y.hop[ky]) * row_stride +
               (x.phase[kx] * panel_cols + x.hop[kx]) * column_stride;
    }
};

}  // namespace sparse_ft
