// Gather product: forward and input gradient.
//     for every row r, position p:  D[r, p] = bias[r] + sum_k w[r, k] * S[channel(k), p * step + tap(k)]
// A tile's lanes (cols x samples) are up to twelve vectors of accumulators in registers; each nonzero
// is one broadcast and one fused multiply-add per vector with a panel operand; each output is stored once.
#include <array>
#include <atomic>
#include <omp.h>
#include <utility>

#include "empty_planes.h"
#include "kernels.h"
#include "panel.h"
#include "result.h"
#include "transpose.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

constexpr int kRowVectors = 12;

struct RowSet {  // rows that read one packed panel block
    const int32_t *segment, *offset;
    const float* value;
    int64_t segment_stride;
};

// Rows [begin, end) x tile rows; out(row, r) = out + (row - begin) * out_row + r * out_tile_row.
template <int V>
void rows_times_panel(const RowSet& set, int64_t block, int64_t begin, int64_t end, const float* panel,
                      int64_t tile_rows, int64_t panel_row, float* out, int64_t out_row, int64_t out_tile_row,
                      const float* bias) {
    for (int64_t row = begin; row < end; ++row, out += out_row) {
        const int32_t first = set.segment[row * set.segment_stride + block];
        const int32_t last = set.segment[row * set.segment_stride + block + 1];
        const float* source = panel;
        float* to = out;
        for (int64_t r = 0; r < tile_rows; ++r, source += panel_row, to += out_tile_row) {
            vec acc[V];
            if (block == 0) {
                const vec start = splat(bias ? bias[row] : 0.0f);
                for (int v = 0; v < V; ++v) acc[v] = start;
            } else {
                for (int v = 0; v < V; ++v) acc[v] = load(to + v * kLanes);
            }
            for (int32_t j = first; j < last; ++j) {
                const vec w = splat(set.value[j]);
                const float* s = source + set.offset[j];
                for (int v = 0; v < V; ++v) acc[v] += w * load(s + v * kLanes);
            }
            for (int v = 0; v < V; ++v) store(to + v * kLanes, acc[v]);
        }
    }
}

using RowKernel = decltype(&rows_times_panel<1>);

template <size_t... V>
constexpr std::array<RowKernel, sizeof...(V) + 1> row_kernels(std::index_sequence<V...>) {
    return {nullptr, rows_times_panel<int(V) + 1>...};
}
constexpr auto kRowKernels = row_kernels(std::make_index_sequence<kRowVectors>());

// Writes one row's finished tile, staged as [tile row][padded run of `lanes` a position], to a batch-last destination.
template <class T, class Result>
void scatter_batch_last(const Geometry& g, const Plane& p, const Tile& tile, float* from, int64_t padded,
                        int64_t lanes, const View& d, int64_t row, const Result& result) {
    for (int64_t r = 0; r < tile.rows; ++r)
        for (int64_t c = 0; c < tile.cols; ++c) {
            const int64_t at = row * d.c + (p.dest_y + (tile.y + r) * g.dest_step_y) * d.y +
                               (p.dest_x + (tile.x + c) * g.dest_step_x) * d.x + tile.n;
            float* results = from + r * padded + c * lanes;
            result.finish(row, results, at, tile.lanes);
            write_run(static_cast<T*>(d.data) + at, results, tile.lanes, false);
        }
}

// The same for a block of rows of a channels-last destination: positions are transposed tiles.
template <class T>
void scatter_channels_last(const Geometry& g, const Plane& p, const Tile& tile, const float* from, int64_t padded,
                           const View& d, int64_t row, int64_t count) {
    for (int64_t r = 0; r < tile.rows; ++r)
        for (int64_t c = 0; c < tile.cols; ++c)
            transpose(from + r * padded + c * tile.lanes, tile.rows * padded,
                      static_cast<T*>(d.data) + row + (p.dest_y + (tile.y + r) * g.dest_step_y) * d.y +
                          (p.dest_x + (tile.x + c) * g.dest_step_x) * d.x + tile.n * d.n,
                      d.n, count, tile.lanes);
}

class GatherProduct {
  public:
    explicit GatherProduct(const Product& product) : q(product), g(product.geometry) {
        const int64_t rows = g.groups * g.rows_per_group;
        int64_t segments = 0;
        for (int64_t i = 0; i < q.plane_count; ++i) {
            tilings.emplace_back(g, q.planes[i], limits());
            tables.emplace_back(tilings[i], g);
            segment_start.push_back(segments);
            segments += rows * (tilings[i].blocks + 1);
        }
        thread_local Scratch shared_offsets, shared_values, shared_segments;
        offsets = shared_offsets.ints(size_t(q.nnz) + 1);
        gathered = q.perm ? shared_values.floats(size_t(q.nnz) + 1) : nullptr;
        segment = shared_segments.ints(size_t(segments) + 1);
        split_work();
    }

    const char* run() {
        const int64_t rows = g.groups * g.rows_per_group;
        // The planes' rows follow one another.
        if (const char* text = check_ends(q.planes[0].row_ptr[0], q.planes[q.plane_count - 1].row_ptr[rows], q.nnz))
            return text;
        std::atomic<const char*> problem{nullptr};
#pragma omp parallel num_threads(q.threads)
        {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < q.plane_count * rows; ++i)
                if (const char* text = prepare_row(i / rows, i % rows)) problem = text;
            if (problem.load() == nullptr) {
                thread_local Scratch panel_scratch, stage_scratch;
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < items.back(); ++i) compute(i, panel_scratch, stage_scratch);
            }
        }
        return problem;
    }

  private:
    const Product& q;
    const Geometry& g;
    std::vector<Tiling> tilings;
    std::vector<OffsetTable> tables;
    std::vector<int64_t> segment_start;
    std::vector<int64_t> items{0};  // running count of work items per plane
    int64_t parts = 1;              // row parts of a tile, where there are too few tiles for the threads
    int32_t *offsets, *segment;
    float* gathered;

    // Measured choices. Token-major sources are all samples and no positions: narrow tiles keep a panel of many
    // inputs high in the caches. Elsewhere long rows pay for a reduction in blocks that sit high in the
    // second-level cache; for short rows a larger panel (less halo packed, fewer partial sums) is worth more.
    TileLimits limits() const {
        if (q.source.n != 1) return {4 * kLanes, 4 * kLanes, 8, 96 << 10};
        const int64_t rows = g.groups * g.rows_per_group * q.plane_count;
        return {kRowVectors * kLanes, kRowVectors * kLanes, 8, (q.nnz > 48 * rows ? 128 : 448) << 10};
    }

    void split_work() {
        const int64_t rows = g.groups * g.rows_per_group;
        int64_t tiles = 0;
        for (const Tiling& t : tilings) tiles += t.tiles();
        if (tiles > 0 && q.threads > 1 && tiles < 4 * q.threads)
            parts = std::clamp<int64_t>((4 * q.threads + tiles - 1) / tiles, 1, std::max<int64_t>(rows / 16, 1));
        for (const Tiling& t : tilings) items.push_back(items.back() + t.tiles() * parts);
    }

    const char* prepare_row(int64_t plane, int64_t row) {
        const Plane& p = q.planes[plane];
        int32_t* bounds = segment + segment_start[plane] + row * (tilings[plane].blocks + 1);
        if (const char* text = tables[plane].prepare(tilings[plane], g, p.row_ptr, row, q.nnz, q.col, offsets, bounds))
            return text;
        if (q.perm == nullptr) return nullptr;
        for (int32_t j = p.row_ptr[row]; j < p.row_ptr[row + 1]; ++j) {
            if (uint32_t(q.perm[j]) >= uint64_t(q.nnz)) return "permutation is out of range";
            gathered[j] = q.values[q.perm[j]];
        }
        return nullptr;
    }

    void compute(int64_t item, Scratch& panel_scratch, Scratch& stage_scratch) {
        const int64_t plane = std::upper_bound(items.begin(), items.end(), item) - items.begin() - 1;
        const Plane& p = q.planes[plane];
        const Tiling& t = tilings[plane];
        const int64_t part = (item - items[plane]) % parts;
        const Tile tile(t, g, p, (item - items[plane]) / parts);
        const int64_t rows = g.groups * g.rows_per_group;
        // Parts are cut at multiples of 16 rows, so that channels-last stores fill whole cache lines.
        const int64_t cut = (rows + parts - 1) / parts, step = (cut + 15) / 16 * 16;
        const int64_t first = std::min(part * step, rows), last = std::min(first + step, rows);
        if (first == last) return;
        const RowSet set{segment + segment_start[plane], offsets, gathered ? gathered : q.values, t.blocks + 1};
        const int64_t run = tile.run(), vectors = (run + kLanes - 1) / kLanes, padded = vectors * kLanes;
        const RowKernel kernel = kRowKernels[vectors];
        float* panel = panel_scratch.floats(size_t(t.panel_floats() + kRowVectors * kLanes));
        const View& d = q.dest;
        const bool direct = q.element == Element::kFloat && !q.result && d.n == 1 && run == padded &&
                            (tile.cols == 1 || d.x * g.dest_step_x == tile.lanes);
        // A blocked reduction keeps all its rows' sums until the last block; otherwise 16 rows at a time are staged.
        const int64_t stage_rows = t.blocks > 1 ? std::min(g.rows_per_group, last - first) : 16;
        float* stage = direct ? nullptr : stage_scratch.floats(size_t(stage_rows * tile.rows * padded));

        for_each_panel(
            t, g, first, last, [&](int64_t row0, int64_t row1, int64_t block, int64_t channel, int64_t count) {
                pack_panel(t, tile, q, channel, count, panel);
                if (direct) {
                    float* out = static_cast<float*>(d.data) + row0 * d.c + (p.dest_y + tile.y * g.dest_step_y) * d.y +
                                 (p.dest_x + tile.x * g.dest_step_x) * d.x + tile.n;
                    kernel(set, block, row0, row1, panel, tile.rows, t.row_stride, out, d.c, g.dest_step_y * d.y,
                           q.bias);
                    return;
                }
                for (int64_t row = row0; row < row1; row += stage_rows) {
                    const int64_t end = std::min(row + stage_rows, row1);
                    kernel(set, block, row, end, panel, tile.rows, t.row_stride, stage, tile.rows * padded, padded,
                           q.bias);
                    if (block + 1 < t.blocks) continue;
                    with_element(q.element, [&](auto element) {
                        using T = decltype(element);
                        if (d.n != 1) return scatter_channels_last<T>(g, p, tile, stage, padded, d, row, end - row);
                        with_result<T>(q, [&](auto result) {
                            for (int64_t r = row; r < end; ++r)
                                scatter_batch_last<T>(g, p, tile, stage + (r - row) * tile.rows * padded, padded,
                                                      t.lanes, d, r, result);
                        });
                    });
                }
            });
    }
};

}  // namespace

const char* gather_product(const Product& product) {
    if (is_depthwise(product)) return run_depthwise(product);
    return clearing_empty_planes(product, [](const Product& q) { return GatherProduct(q).run(); });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
