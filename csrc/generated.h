// What the two generated products share: tiles, packing, and when they pay.
#pragma once
#include <unistd.h>

#include "panel.h"
#include "transpose.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

// Bytes of a panel, as measured. The second-level cache has room for what streams by, and for the panel of a neighbour
// on the same core. Sums over lanes, which a weight gradient pays once a tile, ask for larger ones; so do linear
// layers, whose panels hold all their inputs.
constexpr int64_t kTokenPanel = 448 << 10;
inline bool large_second_level() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    static const bool large = sysconf(_SC_LEVEL2_CACHE_SIZE) >= 2 << 20;
    return large;
#else
    return false;
#endif
}
inline int64_t gather_panel() { return large_second_level() ? kTokenPanel : 256 << 10; }
inline int64_t sampled_panel() { return large_second_level() ? kTokenPanel : 320 << 10; }
constexpr int64_t kRunVectors = 32;  // of a tile row, at most

// Vectors of a tile row: the code steps from one to the next.
struct Run {
    int64_t floats, vectors, step;  // step: floats in the panel
    Run(const Tiling& t, const Tile& tile)
        : floats(t.group_stride > 0 || tile.cols == 1 ? tile.lanes : tile.cols * t.lanes),
          vectors((floats + kLanes - 1) / kLanes),
          step(t.group_stride > 0 ? t.group_stride : kLanes) {}
};

// Vectors of a tile of a lone position, at most `most`: as many tiles as keep all threads at work to the end.
inline int64_t even_vectors(const Product& q, int64_t most) {
    const int64_t all = (q.geometry.batch + kLanes - 1) / kLanes, tiles = (all + most - 1) / most;
    const int64_t shared = (tiles + q.threads - 1) / q.threads * q.threads;
    return std::max<int64_t>((all + shared - 1) / shared, std::min<int64_t>(most, 4));
}

inline TileLimits generated_limits(const Product& q) {
    const Geometry& g = q.geometry;
    const int64_t vector_bytes = g.groups * g.channels_per_group * kLanes * 4;
    if (q.source.n != 1) {  // token-major
        const int64_t vectors = even_vectors(q, std::clamp<int64_t>(kTokenPanel / vector_bytes, 8, kRunVectors));
        return {vectors * kLanes, vectors * kLanes, 1, kTokenPanel, false, kLanes};
    }
    const int64_t bytes = q.value_grad ? sampled_panel() : gather_panel();
    int64_t positions = 0;
    for (int64_t i = 0; i < q.plane_count; ++i)
        positions = std::max(positions, q.planes[i].height * q.planes[i].width);
    if (positions <= 1) {
        const int64_t vectors = even_vectors(q, std::clamp<int64_t>(bytes / vector_bytes, 4, kRunVectors));
        return {vectors * kLanes, vectors * kLanes, 1, bytes, false, 0, true};
    }
    // A chunk of a gather product reads the same lines of all channels, one position after another. A weight gradient
    // sums long runs.
    const bool gathers = q.value_grad == nullptr;
    const int64_t samples = std::min<int64_t>(g.batch, 16 * kLanes), part = gathers ? 2 * kLanes : 0;
    return {samples, kRunVectors * kLanes, 64, bytes, true, 0, true, gathers, part};
}

// A larger source comes from memory, however soon it is read after it was written.
#if defined(SPARSE_FT_FUZZ)
constexpr int64_t kFarBytes = 2 << 10;  // so that inputs of the fuzzer's size are on both sides of it
#else
constexpr int64_t kFarBytes = 16 << 20;
#endif

inline int64_t source_bytes(const Product& q) {
    const Geometry& g = q.geometry;
    return g.source_h * g.source_w * g.batch * g.groups * g.channels_per_group * element_bytes(q.element);
}

// Whether a gather product reads its source where it lies: a 1 x 1 convolution without stride has nothing to gain from
// a panel but lines that are in the second-level cache, and they can be fetched there while the tile before is
// computed. A smaller source has been there anyway, so that a panel, whose channels lie close together, is no slower.
inline bool reads_in_place(const Product& q) {
    const Geometry& g = q.geometry;
    const int64_t channels = g.groups * g.channels_per_group;
    return q.plane_count == 1 && g.taps_h * g.taps_w == 1 && q.planes[0].height * q.planes[0].width == 1 &&
           g.source_h * g.source_w == 1 && q.source.n == 1 && q.dest.n == 1 && g.batch % kLanes == 0 &&
           q.element == Element::kFloat && q.norm == nullptr && q.planes[0].tap_y[0] == 0 &&
           q.planes[0].tap_x[0] == 0 && source_bytes(q) > kFarBytes &&
           channels * q.source.c < Tiling::kMaxChannelFloats;
}
// Its tiles: some lanes of all channels.
inline Tiling in_place_tiling(const Product& q) {
    const Geometry& g = q.geometry;
    const int64_t vector_bytes = g.groups * g.channels_per_group * kLanes * 4;
    const int64_t vectors = even_vectors(q, std::clamp<int64_t>(gather_panel() / vector_bytes, 4, kRunVectors));
    Tiling t(g, q.planes[0], {vectors * kLanes, vectors * kLanes, 1, INT64_MAX / 2});
    t.channel_stride = q.source.c;
    return t;
}

inline void pack(const Tiling& t, const Tile& tile, const Product& q, int64_t channel, int64_t count, float* panel) {
    if (t.group_stride == 0) return pack_panel(t, tile, q, channel, count, panel);
    const View& s = q.source;
    const int64_t x = t.x.source(0, 0, 0), y = t.y.source(0, 0, 0);  // a linear layer has one position
    with_element(q.element, [&](auto element) {
        const auto* from = static_cast<const decltype(element)*>(s.data) + channel + y * s.y + x * s.x + tile.n * s.n;
        float* to = panel;
        for (int64_t n = 0; n < tile.lanes; n += kLanes, to += t.group_stride)
            for (int64_t c = 0; c < count; c += 16)
                transpose16(from + c + n * s.n, s.n, std::min<int64_t>(kLanes, tile.lanes - n), to + c * kLanes,
                            kLanes, std::min<int64_t>(16, count - c), true);
    });
}

// The nonzeros of some rows in the order in which code reads the source.
class SortedNonzeros {
  public:
    struct Entry {
        int32_t offset, row, index;  // floats from the panel; from the first row asked for; in the pattern
    };
    SortedNonzeros(const Product& product, const Tiling& tiling, const Plane& plane)
        : q(product), t(tiling), p(plane), g(product.geometry) {}

    // Null, or what is wrong with the pattern; to be called once before the rest.
    const char* prepare() {
        const int64_t rows = g.groups * g.rows_per_group;
        offsets.resize(size_t(q.nnz));
        segment.resize(size_t(rows * (t.blocks + 1)));
        const OffsetTable table(t, g);
        for (int64_t row = 0; row < rows; ++row)
            if (const char* problem = table.prepare(t, g, p.row_ptr, row, q.nnz, q.col, offsets.data(),
                                                    segment.data() + row * (t.blocks + 1)))
                return problem;
        return nullptr;
    }

    // Of rows [row, end) in one block of channels, rows ascending at each position: a counting sort by column.
    const std::vector<Entry>& sort(int64_t row, int64_t end, int64_t block) {
        const int64_t taps = g.taps_h * g.taps_w, base = t.blocks > 1 ? block * t.block_channels * taps : 0;
        place.assign(size_t(t.block_channels * taps) + 1, 0);
        auto each = [&](auto body) {
            for (int64_t r = row; r < end; ++r) {
                const int32_t* bounds = segment.data() + r * (t.blocks + 1) + block;
                for (int32_t j = bounds[0]; j < bounds[1]; ++j)
                    if (offsets[size_t(j)] >= 0) body(r, j);
            }
        };
        each([&](int64_t, int32_t j) { ++place[size_t(q.col[j] - base) + 1]; });
        for (size_t i = 1; i < place.size(); ++i) place[i] += place[i - 1];
        entries.resize(size_t(place.back()));
        each([&](int64_t r, int32_t j) {
            entries[size_t(place[size_t(q.col[j] - base)]++)] = {offsets[size_t(j)], int32_t(r - row), j};
        });
        return entries;
    }

  private:
    const Product& q;
    const Tiling& t;
    const Plane& p;
    const Geometry& g;
    std::vector<int32_t> offsets, segment, place;
    std::vector<Entry> entries;
};

// A tile's cost in cycles, roughly as measured: packing it, and computing all of its rows.
struct TileCost {
    double pack, compute;
    TileCost(const Tiling& t, const Geometry& g, int64_t nnz)
        : pack(0.5 * double(t.group_stride > 0 ? t.panel_floats() * t.blocks * t.chunks
                                               : g.groups * g.channels_per_group * t.channel_stride)),
          compute(1.6 * double(nnz) * t.y.share() * t.x.share() * double(t.rows * t.cols * t.lanes) / kLanes) {}
    // Of `tiles` tiles in `parts` parts each, which pack the tile anew, spread over some threads.
    double all(int64_t tiles, int64_t parts, int64_t threads) const {
        return double((tiles * parts + threads - 1) / threads) * (pack + compute / double(parts));
    }
};

// Code pays where its loads are shared by several rows, and where there are lanes enough to run it over. A stride
// above two has more phases, each with code of its own, than `Programs` keeps: they would be made anew at every step.
// Groups of a token-major product, which nobody has, would end within the bands of rows that are written together.
inline bool worth_generating(const Product& q, int64_t least_vectors) {
    const Geometry& g = q.geometry;
    int64_t lanes = 0;
    for (int64_t i = 0; i < q.plane_count; ++i) lanes += q.planes[i].height * q.planes[i].width * g.batch;
    return q.programs != nullptr && q.plane_count <= 4 && g.rows_per_group >= 8 && lanes >= least_vectors * kLanes &&
           q.nnz > 0 && (q.source.n == 1 || g.groups == 1);
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
