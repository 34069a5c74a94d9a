// Sampled product: the weight gradient, at the nonzeros only.
//     for every nonzero j = (r, k):  dw[j] = sum_p G[r, p] * S[channel(k), p * step + tap(k)]
// Eight nonzeros of a row share each loaded vector of G; their eight accumulators stay in registers
// over all lanes and rows of a tile and are closed by one shuffle tree. Each thread sums its own
// tiles; the partial sums are added in thread order, so the result depends on the thread count alone.
#include <algorithm>
#include <atomic>
#include <omp.h>

#include "kernels.h"
#include "panel.h"
#include "row_sums.h"
#include "transpose.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

struct RowLanes {  // where one row of G lies for a tile
    const float* data;
    int64_t tile_row;
};

constexpr int kDotVectors = 16;  // of a tile: longer runs spread the cost of the closing sums

template <int M>
void dot_group(const RowLanes& grad, const float* panel, int64_t panel_row, int64_t tile_rows, int64_t run,
               const int32_t* offset, float* out) {
    vec acc[8] = {};
    const float* s[M];
    for (int m = 0; m < M; ++m) s[m] = panel + offset[m];
    const int64_t whole = run / kLanes * kLanes;
    for (int64_t r = 0; r < tile_rows; ++r) {
        const float* g = grad.data + r * grad.tile_row;
        const int64_t at = r * panel_row;
        for (int64_t lane = 0; lane < whole; lane += kLanes) {
            const vec gv = load(g + lane);
            for (int m = 0; m < M; ++m) acc[m] += gv * load(s[m] + at + lane);
        }
        if (whole < run) {  // beyond the run the panel holds other positions, whose NaN or Inf must not leak in
            const ivec mask = lane_mask(int(run - whole));
            const vec gv = keep_lanes(load(g + whole), mask);
            for (int m = 0; m < M; ++m) acc[m] += gv * keep_lanes(load(s[m] + at + whole), mask);
        }
    }
    const vec8 total = sum8(acc);
    if (M == 8) {
        *reinterpret_cast<vec8_u*>(out) = *reinterpret_cast<const vec8_u*>(out) + total;
    } else {
        for (int m = 0; m < M; ++m) out[m] += total[m];
    }
}

using DotKernel = decltype(&dot_group<1>);
constexpr DotKernel kDotKernels[9] = {nullptr,      dot_group<1>, dot_group<2>, dot_group<3>, dot_group<4>,
                                      dot_group<5>, dot_group<6>, dot_group<7>, dot_group<8>};

class SampledProduct {
  public:
    explicit SampledProduct(const Product& product)
        : q(product),
          g(product.geometry),
          p(product.planes[0]),
          t(g, p, {kDotVectors * kLanes, kDotVectors * kLanes, 8, kPanelBytes}),
          table(t, g),
          rows(g.groups * g.rows_per_group) {
        thread_local Scratch shared_offsets, shared_segments, shared_partials;
        offsets = shared_offsets.ints(size_t(q.nnz) + 1);
        segment = shared_segments.ints(size_t(rows * (t.blocks + 1)) + 1);
        const int64_t partial_limit = std::max<int64_t>(1, kPartialBytes / 4 / std::max<int64_t>(q.nnz, 1));
        tile_groups = std::clamp<int64_t>(std::min<int64_t>(t.tiles(), partial_limit), 1, q.threads);
        row_groups = q.threads / tile_groups;
        partial = tile_groups > 1 ? shared_partials.floats(size_t(tile_groups * q.nnz) + 1) : q.value_grad;
    }

    const char* run() {
        if (const char* text = check_ends(p.row_ptr[0], p.row_ptr[rows], q.nnz)) return text;
        std::atomic<const char*> problem{nullptr};
#pragma omp parallel num_threads(q.threads)
        {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; ++row)
                if (const char* text =
                        table.prepare(t, g, p.row_ptr, row, q.nnz, q.col, offsets, segment + row * (t.blocks + 1)))
                    problem = text;
            if (problem.load() == nullptr) {
#pragma omp for schedule(static)
                for (int64_t part = 0; part < tile_groups * row_groups; ++part)
                    sum_tiles(part / row_groups, part % row_groups);
                if (tile_groups > 1) {
#pragma omp for schedule(static)
                    for (int64_t j = 0; j < q.nnz; ++j) {
                        float total = 0;
                        for (int64_t i = 0; i < tile_groups; ++i) total += partial[i * q.nnz + j];
                        q.value_grad[j] = total;
                    }
                }
            }
        }
        return problem;
    }

  private:
    const Product& q;
    const Geometry& g;
    const Plane& p;
    const Tiling t;
    const OffsetTable table;
    const int64_t rows;
    int64_t tile_groups, row_groups;
    int32_t *offsets, *segment;
    float* partial;
    static constexpr int64_t kPanelBytes = 448 << 10;
    static constexpr int64_t kPartialBytes = 256 << 20;

    int64_t row_cut(int64_t i) const {  // rows split by nonzeros
        if (i == 0) return 0;
        if (i == row_groups) return rows;
        const int64_t target = q.nnz * i / row_groups;
        return std::lower_bound(p.row_ptr, p.row_ptr + rows, int32_t(target)) - p.row_ptr;
    }

    void sum_tiles(int64_t tile_group, int64_t row_group) {
        const int64_t first = row_cut(row_group), last = row_cut(row_group + 1);
        float* sums = partial + tile_group * (tile_groups > 1 ? q.nnz : 0);
        std::fill(sums + p.row_ptr[first], sums + p.row_ptr[last], 0.0f);
        const int64_t tiles = t.tiles();
        for (int64_t i = tiles * tile_group / tile_groups; i < tiles * (tile_group + 1) / tile_groups; ++i)
            sum_tile(Tile(t, g, p, i), first, last, sums);
    }

    void sum_tile(const Tile& tile, int64_t first, int64_t last, float* sums) {
        thread_local Scratch panel_scratch, stage_scratch;
        float* panel = panel_scratch.floats(size_t(t.panel_floats() + kDotVectors * kLanes));
        const View& d = q.grad;
        const int64_t run = tile.run(), padded = (run + kLanes - 1) / kLanes * kLanes;
        const bool direct =
            q.element == Element::kFloat && d.n == 1 && run == padded && (tile.cols == 1 || d.x == tile.lanes);
        const int64_t stage_rows = direct ? 1 : 16;
        float* stage = direct ? nullptr : stage_scratch.floats(size_t(stage_rows * tile.rows * padded));
        for_each_panel(
            t, g, first, last, [&](int64_t row0, int64_t row1, int64_t block, int64_t channel, int64_t count) {
                pack_panel(t, tile, q, channel, count, panel);
                for (int64_t row = row0; row < row1; row += stage_rows) {
                    const int64_t end = std::min(row + stage_rows, row1);
                    if (!direct) stage_grad(tile, row, end, padded, stage);
                    for (int64_t r = row; r < end; ++r) {
                        const RowLanes lanes = direct ? RowLanes{static_cast<float*>(d.data) + r * d.c + tile.y * d.y +
                                                                     tile.x * d.x + tile.n,
                                                                 d.y}
                                                      : RowLanes{stage + (r - row) * tile.rows * padded, padded};
                        const int32_t* bounds = segment + r * (t.blocks + 1) + block;
                        int32_t j = bounds[0];
                        for (; j + 8 <= bounds[1]; j += 8)
                            dot_group<8>(lanes, panel, t.row_stride, tile.rows, run, offsets + j, sums + j);
                        if (j < bounds[1])
                            kDotKernels[bounds[1] - j](lanes, panel, t.row_stride, tile.rows, run, offsets + j,
                                                       sums + j);
                    }
                }
            });
    }

    // Rows [row, end) of G for this tile, as [row][tile row][padded run].
    void stage_grad(const Tile& tile, int64_t row, int64_t end, int64_t padded, float* stage) {
        with_element(q.element, [&](auto element) {
            stage_grad_as(tile, row, end, padded, static_cast<const decltype(element)*>(q.grad.data), stage);
        });
    }
    template <class T>
    void stage_grad_as(const Tile& tile, int64_t row, int64_t end, int64_t padded, const T* data, float* stage) {
        const View& d = q.grad;
        for (int64_t r = 0; r < tile.rows; ++r)
            for (int64_t c = 0; c < tile.cols; ++c) {
                float* to = stage + r * padded + c * tile.lanes;
                const T* from = data + (tile.y + r) * d.y + (tile.x + c) * d.x;
                if (d.n == 1) {
                    for (int64_t i = row; i < end; ++i)
                        read_run(from + i * d.c + tile.n, to + (i - row) * tile.rows * padded, tile.lanes);
                } else {
                    transpose(from + row + tile.n * d.n, d.n, to, tile.rows * padded, tile.lanes, end - row);
                }
            }
    }
};

}  // namespace

const char* sampled_product(const Product& product) {
    if (full_sampled_product(product)) return nullptr;
    const char* problem = is_depthwise(product) ? run_depthwise(product) : SampledProduct(product).run();
    if (problem == nullptr && product.row_sums != nullptr) sum_rows(product);
    return problem;
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
