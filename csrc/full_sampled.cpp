// Weight gradient of a layer without zeros, such as a network's first convolution: dense blocks of it stay in
// registers.
//     dw[r, k] = sum_p G[r, p] * S[channel(k), p * step + tap(k)]
// G's rows are transposed for a stretch of lanes, so that a vector holds one lane of many rows: times one value of the
// source it is an outer product, whose sums need no adding up across a vector, and of which the source is read value
// by value instead of vector by vector. Sums over a stretch are kept in registers and then join those of the thread.
#include <algorithm>
#include <omp.h>

#include "kernels.h"
#include "panel.h"
#include "transpose.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

constexpr int kMostVectors = 4;  // of rows at a time
constexpr int kMostColumns = 9;
constexpr int64_t kStretchLanes = 96;  // with 64 rows 24 KB of G, which stay in the first-level cache
constexpr int64_t kLeastColumns = 64;  // for fewer the transposing does not pay

// Columns at a time: as many as registers hold the sums of, beside the vectors of G and one of the source.
constexpr int columns_of(int vectors) {
    const int registers = kLanes == 16 ? 24 : 10;
    return std::min(registers / vectors, kMostColumns);
}

// sums[c][row] += sum over lanes of grad[lane][row] * x[offset[c] + lane].
template <int V>
void add_outer_products(const float* grad, const float* x, const int32_t* offset, int64_t lanes, float* sums) {
    constexpr int C = columns_of(V), kRows = V * kLanes;
    const float* from[C];
    vec total[C][V] = {};
    for (int c = 0; c < C; ++c) from[c] = x + offset[c];
    for (int64_t lane = 0; lane < lanes; ++lane, grad += kRows) {
        vec g[V];
        for (int v = 0; v < V; ++v) g[v] = in_register(load(grad + v * kLanes));
        for (int c = 0; c < C; ++c) {
            const vec value = in_register(splat(from[c][lane]));
            for (int v = 0; v < V; ++v) total[c][v] += g[v] * value;
        }
    }
    for (int c = 0; c < C; ++c)
        for (int v = 0; v < V; ++v) {
            float* to = sums + c * kRows + v * kLanes;
            store(to, load(to) + total[c][v]);
        }
}

using OuterProducts = decltype(&add_outer_products<1>);
constexpr OuterProducts kOuterProducts[kMostVectors + 1] = {nullptr, add_outer_products<1>, add_outer_products<2>,
                                                            add_outer_products<3>, add_outer_products<4>};

class FullSampled {
  public:
    explicit FullSampled(const Product& product)
        : q(product),
          g(product.geometry),
          p(product.planes[0]),
          t(g, p, {16 * kLanes, 32 * kLanes, 64, kPanelBytes, true}),
          table(t, g),
          taps(g.taps_h * g.taps_w),
          columns(g.channels_per_group * taps) {
        for (int64_t row = 0; row < g.rows_per_group; row += kMostVectors * kLanes) {
            const int64_t rows = std::min<int64_t>(g.rows_per_group - row, kMostVectors * kLanes);
            const int64_t vectors = (rows + kLanes - 1) / kLanes;
            bands.push_back({row, rows, int(vectors), part_floats});
            part_floats += columns * vectors * kLanes;
        }
    }

    // Whether the lanes of a row of positions follow one another, and all threads have tiles.
    bool fits() const { return g.batch == t.lanes && (t.cols == 1 || q.grad.x == t.lanes) && t.tiles() >= q.threads; }

    void run() {
        thread_local Scratch shared_sums;
        float* sums = shared_sums.floats(size_t(q.threads * part_floats));
#pragma omp parallel num_threads(q.threads)
        {
            thread_local Scratch panel_scratch, stage_scratch;
#pragma omp for schedule(static)
            for (int64_t part = 0; part < q.threads; ++part) {
                float* to = sums + part * part_floats;
                std::fill(to, to + part_floats, 0.0f);
                for (int64_t i = t.tiles() * part / q.threads; i < t.tiles() * (part + 1) / q.threads; ++i)
                    sum_tile(Tile(t, g, p, i), to, panel_scratch, stage_scratch);
            }
#pragma omp for schedule(static)
            for (int64_t row = 0; row < g.rows_per_group; ++row) {
                const Band& band = bands[size_t(row / (kMostVectors * kLanes))];
                for (int64_t k = 0; k < columns; ++k) {
                    float total = 0;
                    for (int64_t part = 0; part < q.threads; ++part)
                        total += sums[part * part_floats + band.sums + k * band.vectors * kLanes + row - band.row];
                    q.value_grad[row * columns + k] = total;
                }
            }
        }
    }

  private:
    struct Band {  // some rows, and where their sums begin: [column][row]
        int64_t row, rows;
        int vectors;
        int64_t sums;
    };
    struct Stretch {  // number `i` of a tile's: its row of positions, its lanes of that, and where its G begins
        int64_t row, lane, lanes, grad;
        Stretch(const View& d, const Band& band, const Tile& tile, int64_t i) {
            const int64_t run = tile.run(), parts = (run + kStretchLanes - 1) / kStretchLanes;
            row = i / parts;
            lane = run * (i % parts) / parts;
            lanes = run * (i % parts + 1) / parts - lane;
            grad = band.row * d.c + (tile.y + row) * d.y + tile.x * d.x + tile.n + lane;
        }
        static int64_t count(const Tile& tile) {
            return tile.rows * ((tile.run() + kStretchLanes - 1) / kStretchLanes);
        }
    };
    const Product& q;
    const Geometry& g;
    const Plane& p;
    const Tiling t;
    const OffsetTable table;
    const int64_t taps, columns;
    std::vector<Band> bands;
    int64_t part_floats = 0;
    static constexpr int64_t kPanelBytes = 448 << 10;

    void sum_tile(const Tile& tile, float* sums, Scratch& panel_scratch, Scratch& stage_scratch) const {
        float* panel = panel_scratch.floats(size_t(t.panel_floats()));
        float* stage = stage_scratch.floats(size_t(kStretchLanes * kMostVectors * kLanes));
        const int64_t count = Stretch::count(tile);
        for_each_panel(t, g, 0, g.rows_per_group, [&](int64_t, int64_t, int64_t, int64_t channel, int64_t channels) {
            pack_panel(t, tile, q, channel, channels, panel);
            for (const Band& band : bands)
                for (int64_t i = 0; i < count; ++i) {
                    const Stretch here(q.grad, band, tile, i), next(q.grad, band, tile, std::min(i + 1, count - 1));
                    stage_grad(band, here, stage);
                    add_columns(band, channel * taps, channels * taps, panel + here.row * t.row_stride + here.lane,
                                stage, here.lanes, next, sums + band.sums);
                }
        });
    }

    // The band's rows of G over a stretch, as [lane][row]; rows that are none are zeros.
    void stage_grad(const Band& band, const Stretch& here, float* stage) const {
        const int64_t width = band.vectors * kLanes;
        if (band.rows < width) std::fill(stage, stage + here.lanes * width, 0.0f);
        with_element(q.element, [&](auto element) {
            const auto* from = static_cast<const decltype(element)*>(q.grad.data) + here.grad;
            transpose(from, q.grad.c, stage, width, band.rows, here.lanes);
        });
    }

    void add_columns(const Band& band, int64_t first, int64_t count, const float* x, const float* stage, int64_t lanes,
                     const Stretch& next, float* sums) const {
        const int64_t width = band.vectors * kLanes, step = columns_of(band.vectors), end = first + count;
        // The next stretch's G lies in as many pages as it has rows: some of its lines are fetched with every group of
        // columns, rather than all at once, for which the core would wait.
        const char* ahead = static_cast<const char*>(q.grad.data) + next.grad * element_bytes(q.element);
        const int64_t row_bytes = q.grad.c * element_bytes(q.element);
        const int64_t row_lines = (next.lanes * element_bytes(q.element) + 63) / 64, lines = row_lines * band.rows;
        for (int64_t k = first; k < end; k += step) {
            for (int64_t i = lines * (k - first) / count; i < lines * (std::min(k + step, end) - first) / count; ++i)
                prefetch(ahead + i / row_lines * row_bytes + i % row_lines * 64);
            int32_t offset[kMostColumns];
            for (int64_t c = 0; c < step; ++c) offset[c] = table.offset[size_t(std::min(k + c, end - 1))];
            if (k + step <= end) {
                kOuterProducts[band.vectors](stage, x, offset, lanes, sums + k * width);
                continue;
            }
            float spare[kMostColumns * kMostVectors * kLanes] = {};  // columns beyond the last repeat it
            kOuterProducts[band.vectors](stage, x, offset, lanes, spare);
            for (int64_t i = 0; i < (end - k) * width; ++i) sums[k * width + i] += spare[i];
        }
    }
};

}  // namespace

bool full_sampled_product(const Product& q) {
    const Geometry& g = q.geometry;
    const int64_t columns = g.channels_per_group * g.taps_h * g.taps_w;
    if (g.groups != 1 || q.nnz != g.rows_per_group * columns || g.rows_per_group < kLanes) return false;
    if (columns < kLeastColumns || q.source.n != 1 || q.grad.n != 1 || q.row_sums != nullptr) return false;
    for (int64_t row = 0; row <= g.rows_per_group; ++row)
        if (q.planes[0].row_ptr[row] != row * columns) return false;
    for (int64_t row = 0; row < g.rows_per_group; ++row)
        for (int64_t k = 0; k < columns; ++k)
            if (q.col[row * columns + k] != k) return false;
    FullSampled full(q);
    if (!full.fits()) return false;
    full.run();
    return true;
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
