// A tile's panel: scratch memory for it, packing, and the per-call table of panel offsets. See tiling.h for the
// layout.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>

#include "api.h"
#include "each_vector.h"
#include "element.h"
#include "tiling.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

// Scratch memory that a thread keeps between calls, so that a product allocates (and page-faults) nothing.
class Scratch {
  public:
    float* floats(size_t count) { return of<float>(count); }
    int32_t* ints(size_t count) { return of<int32_t>(count); }
    template <class T>
    T* of(size_t count) {
        return static_cast<T*>(bytes(count * sizeof(T)));
    }

  private:
    void* bytes(size_t size) {
        if (size > size_ || data_ == nullptr) {
            std::free(data_.release());
            size_ = 0;
            const size_t rounded = (size + size / 4 + 4096) / 4096 * 4096;  // a page at least: never null
            void* p = std::aligned_alloc(4096, rounded);
            if (p == nullptr) throw std::bad_alloc();
            data_.reset(p);
            size_ = rounded;
        }
        return data_.get();
    }
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<void, Free> data_;
    size_t size_ = 0;
};

struct Tile {  // one tile's place: first sample, position row and column, and its clipped extents
    int64_t n, y, x, lanes, rows, cols;
    Tile(const Tiling& t, const Geometry& g, const Plane& p, int64_t index) {
        const int64_t xi = index % t.x_tiles, yi = index / t.x_tiles % t.y_tiles, ni = index / t.x_tiles / t.y_tiles;
        n = ni * t.lanes;
        y = yi * t.rows;
        x = xi * t.cols;
        lanes = std::min(t.lanes, g.batch - n);
        rows = std::min(t.rows, p.height - y);
        cols = std::min(t.cols, p.width - x);
    }
    int64_t run() const {
        return cols * lanes;
    }  // contiguous lanes of one position row (cols > 1 only with full lanes)
};

// Channels lie pages apart, where the processor's own prefetching begins anew at each: so many of them ahead, rows of
// `bytes` are fetched by hand.
inline int64_t rows_ahead(int64_t bytes) { return std::clamp<int64_t>(8192 / std::max<int64_t>(bytes, 1), 1, 8); }

// Elements `step` apart, one after another.
template <class T>
inline void gather(const T* from, int64_t step, float* to, int64_t count) {
    if (step == 2)
        for (int64_t i = 0; i < count; ++i) to[i] = widen(from[2 * i]);
    else
        for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i * step]);
}

// What becomes of a channel's values as they are packed: nothing.
struct AsTheyAre {
    vec one(vec v) const { return v; }
    template <class T>
    void spread(const T* from, int64_t step, float* to, int64_t count) const {
        gather(from, step, to, count);
    }
    template <class T>
    void run(const T* from, float* to, int64_t count) const {
        if (count > 4 * kLanes) return read_run(from, to, count);
        each_vector(count, [&](int64_t i, int n) { store(to + i, load(from + i, n), n); });  // too short for a call
    }
};
// Packs channels [channel, channel + count) of the source into the panel.
void pack_panel(const Tiling& t, const Tile& tile, const Product& q, int64_t channel, int64_t count, float* panel);

// Calls body(row0, row1, block, channel, count) for every panel that rows [first, last) need: which of them read
// it, which block of their reduction it is, and the source channels that it holds.
template <class Body>
void for_each_panel(const Tiling& t, const Geometry& g, int64_t first, int64_t last, Body body) {
    for (int64_t chunk = 0; chunk < t.chunks; ++chunk) {
        const int64_t group0 = chunk * t.groups_per_chunk;
        const int64_t group1 = std::min(group0 + t.groups_per_chunk, g.groups);
        const int64_t row0 = std::max(first, group0 * g.rows_per_group);
        const int64_t row1 = std::min(last, group1 * g.rows_per_group);
        if (row0 >= row1) continue;
        const int64_t channels = (group1 - group0) * g.channels_per_group;
        for (int64_t block = 0; block < t.blocks; ++block) {
            const int64_t start = t.blocks > 1 ? block * t.block_channels : 0;
            const int64_t count = t.blocks > 1 ? std::min(t.block_channels, channels - start) : channels;
            body(row0, row1, block, group0 * g.channels_per_group + start, count);
        }
    }
}

// Null, or what is wrong with the first and the last row pointer: entries outside them would be left out.
inline const char* check_ends(int32_t first, int32_t last, int64_t nnz) {
    return first == 0 && last == nnz ? nullptr : "row pointers do not start at 0 and end at the number of nonzeros";
}

// Panel offset of every entry of one plane, checked on the way: a malformed pattern is found here,
// before any kernel reads through it.
struct OffsetTable {
    // Per column index: floats from its block's panel, or why it has no place there (Axis); its block.
    std::vector<int32_t> offset, block;
    OffsetTable(const Tiling& t, const Geometry& g) {
        const int64_t taps = g.taps_h * g.taps_w;
        offset.resize(size_t(g.channels_per_group * taps));
        block.resize(offset.size());
        std::vector<int64_t> tap(static_cast<size_t>(taps));
        for (int64_t k = 0; k < taps; ++k) tap[k] = t.tap_offset(k / g.taps_w, k % g.taps_w);
        for (int64_t c = 0, i = 0; c < g.channels_per_group; ++c)
            for (int64_t k = 0; k < taps; ++k, ++i) {
                block[i] = int32_t(c / t.block_channels);
                offset[i] = tap[k] < 0 ? int32_t(tap[k]) : int32_t(c % t.block_channels * t.channel_stride + tap[k]);
            }
    }
    // segment[b]..segment[b + 1]: the entries of `row` in block b.
    const char* prepare(const Tiling& t, const Geometry& g, const int32_t* row_ptr, int64_t row, int64_t nnz,
                        const int32_t* col, int32_t* offsets, int32_t* segment) const {
        const int32_t begin = row_ptr[row], end = row_ptr[row + 1];
        if (begin < 0 || end < begin || end > nnz)
            return "row pointers are not ascending within the number of nonzeros";
        const int64_t group = row / g.rows_per_group;
        const int32_t base = int32_t(group % t.groups_per_chunk * g.channels_per_group * t.channel_stride);
        const int64_t cols = int64_t(offset.size());
        int32_t current = 0, before = -1;
        segment[0] = begin;
        for (int32_t j = begin; j < end; ++j) {
            const int32_t k = col[j];
            if (k <= before || k >= cols) return "column indices are out of range or not ascending within a row";
            before = k;
            if (offset[k] == Axis::kAbsent) return "an entry's kernel position does not belong to its stride phase";
            for (; current < block[k]; ++current) segment[current + 1] = j;
            offsets[j] = offset[k] < 0 ? offset[k] : base + offset[k];
        }
        for (; current < t.blocks; ++current) segment[current + 1] = end;
        return nullptr;
    }
};

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
