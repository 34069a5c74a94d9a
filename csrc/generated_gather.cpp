// Gather product by generated code: the pattern's nonzeros become straight-line instructions.
//
// Up to 28 rows x one vector of lanes are accumulators. A source vector is loaded once and feeds every row that
// has a nonzero there; a nonzero is one instruction, a fused multiply-add with its value broadcast from memory. No
// index is read at run time, and a nonzero costs half a load instead of the whole one of the plain kernel, so the
// product runs near the processor's peak as long as the panel is in the second-level cache and a chunk's code
// (about 11 bytes a nonzero) in the first.
#include <omp.h>

#include <atomic>

#include "assembler.h"
#include "bypass.h"
#include "empty_planes.h"
#include "executable.h"
#include "fetch_list.h"
#include "generated.h"
#include "kernels.h"
#include "moments.h"
#include "programs.h"
#include "result.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

constexpr int64_t kGatherRows = 28;             // accumulators; the other four registers hold source vectors
constexpr int64_t kBandRows = 4 * kGatherRows;  // staged before they go to a channels-last destination: whole lines
constexpr int64_t kSliceBytes = 16 << 10;       // of results staged at a time
constexpr int64_t kChunkNonzeros = 2048;        // of one chunk, whose code then fits the first-level instruction cache
// A line of the code that follows is fetched for so many nonzeros, the more often the fewer vectors a tile has: about
// four times as much as a chunk takes while it runs over them, so that fetching is some chunks ahead.
inline int64_t nonzeros_per_fetch(const Tiling& t) {
    return std::clamp<int64_t>(t.rows * t.cols * t.lanes / kLanes * 3 / 2, 8, 48);
}

// x, values: of the chunk; out_row: bytes from a row's lanes to the next row's; bias: of the chunk's rows; next: the
// code that runs after this one, fetched meanwhile; ahead: what else is, in code that reads its source in place.
using GatherCode = void (*)(const float* x, const float* values, float* out, int64_t vectors, int64_t x_step,
                            int64_t out_step, int64_t out_row, const float* bias, const uint8_t* next,
                            const char* const* ahead);

struct GatherChunk {  // some rows, and a part of their reduction
    int64_t row, rows, entry, value;
    bool begins, ends;  // the reduction
    int64_t fetched;    // runs of lines, with every vector
};

struct GatherProgram : Program {
    std::unique_ptr<Executable> code;
    std::vector<GatherChunk> chunks;
    std::vector<int64_t> panel{0};  // chunks of panel i: panel[i] up to panel[i + 1]
    std::vector<int32_t> order;     // index of every value, in the code's order
    int64_t run_lines = 0;          // of what is fetched
    size_t runs() const {           // that all chunks fetch with a vector each
        size_t all = 0;
        for (const GatherChunk& chunk : chunks) all += size_t(chunk.fetched);
        return all;
    }
};

class GatherCompiler {
  public:
    GatherCompiler(const Product& product, const Tiling& tiling, const Plane& plane, bool in_place)
        : q(product),
          t(tiling),
          p(plane),
          g(product.geometry),
          per_fetch(nonzeros_per_fetch(tiling)),
          nonzeros(product, tiling, plane) {
        if (in_place) share_out_lines();
    }

    // Null if the pattern is malformed (`problem` says how) or the system allows no generated code.
    std::shared_ptr<const GatherProgram> compile(const char** problem) {
        const int64_t rows = g.groups * g.rows_per_group;
        if ((*problem = nonzeros.prepare())) return nullptr;
        for (int64_t j = p.row_ptr[0]; q.perm && j < p.row_ptr[rows]; ++j)
            if (uint32_t(q.perm[j]) >= uint64_t(q.nnz)) {
                *problem = "permutation is out of range";
                return nullptr;
            }
        program->order.reserve(size_t(p.row_ptr[rows] - p.row_ptr[0]));
        for_each_panel(t, g, 0, rows, [&](int64_t row0, int64_t row1, int64_t block, int64_t, int64_t) {
            for (int64_t group = row0; group < row1; group += g.rows_per_group) {
                for (int64_t row = group, end; row < group + g.rows_per_group; row = end) {
                    end = chunk_end(row, group + g.rows_per_group);
                    add_rows(row, end, block);
                }
            }
            program->panel.push_back(int64_t(program->chunks.size()));
        });
        program->code.reset(new Executable(assembler.data(), size_t(assembler.size())));
        return program->code->valid() ? program : nullptr;
    }

  private:
    using Entry = SortedNonzeros::Entry;
    const Product& q;
    const Tiling& t;
    const Plane& p;
    const Geometry& g;
    const int64_t per_fetch;
    Assembler assembler;
    std::shared_ptr<GatherProgram> program = std::make_shared<GatherProgram>();
    SortedNonzeros nonzeros;
    int64_t runs = 0;  // to be fetched with every vector

    // While a tile is computed, the next one's lines are fetched: with every vector of every chunk about as many.
    void share_out_lines() {
        const int64_t rows = g.groups * g.rows_per_group, tile = t.lanes / kLanes;  // lines of a channel
        const int64_t chunks = std::max((rows + kGatherRows - 1) / kGatherRows, q.nnz / kChunkNonzeros);
        const int64_t lines = (g.groups * g.channels_per_group + chunks - 1) / chunks;
        program->run_lines = std::min(tile, std::max<int64_t>(lines, 4));
        runs = (lines + program->run_lines - 1) / program->run_lines;
    }

    // Whole chunks where rows are written in bands of them; elsewhere as even as can be.
    int64_t chunk_end(int64_t row, int64_t group_end) const {
        const int64_t left = group_end - row, chunks = (left + kGatherRows - 1) / kGatherRows;
        return row + (q.dest.n != 1 ? std::min(left, kGatherRows) : (left + chunks - 1) / chunks);
    }

    void add_rows(int64_t row, int64_t end, int64_t block) {
        const std::vector<Entry>& entries = nonzeros.sort(row, end, block);
        const int64_t count = int64_t(entries.size());
        // Neighbouring positions share source lines: a chunk of fewer finds them in the first-level data cache.
        const int64_t most = g.taps_h * g.taps_w > 1 ? kChunkNonzeros / 2 : kChunkNonzeros;
        const int64_t parts = (count + most - 1) / most;
        const bool first = block == 0, last = block + 1 == t.blocks;
        if (count == 0 && !first && !last) return;
        for (int64_t part = 0, begin = 0; part < std::max<int64_t>(parts, 1); ++part) {
            int64_t stop = parts ? count * (part + 1) / parts : 0;
            while (stop < count && entries[stop].offset == entries[stop - 1].offset) ++stop;
            program->chunks.push_back({row, end - row, assembler.size(), int64_t(program->order.size()),
                                       first && part == 0, last && part + 1 >= parts,
                                       stop - begin >= runs * program->run_lines ? runs : 0});
            emit(program->chunks.back(), entries, begin, stop);
            begin = stop;
        }
    }

    void emit(const GatherChunk& chunk, const std::vector<Entry>& entries, int64_t begin, int64_t end) {
        Assembler& a = assembler;
        const int64_t fetches = (end - begin) / per_fetch;
        const int64_t lines = chunk.fetched * program->run_lines;
        a.reserve(size_t(2 * (end - begin) + (end - begin) / 256 + fetches + 2 * lines + 4 * chunk.rows + 30));
        const int32_t pushed = chunk.fetched > 0 ? 24 : 8;
        a.push(rbx);
        if (chunk.fetched > 0) {
            a.push(rbp);
            a.push(r13);
            a.load_argument(r13, pushed + 32);
        }
        a.load_argument(rax, pushed + 8);
        a.load_argument(rbx, pushed + 24);
        const int64_t top = a.size();
        uint32_t fresh = 0;  // rows whose first product is their value so far
        if (!chunk.begins) {
            a.move(r10, rdx);
            for (int r = 0; r < chunk.rows; ++r) {
                a.load(r, r10, 0);
                a.add(r10, rax);
            }
        } else if (q.bias) {
            a.load_argument(r10, pushed + 16);
            for (int r = 0; r < chunk.rows; ++r) a.broadcast(r, r10, r * 4);
        } else {
            for (int64_t i = begin; i < end; ++i) fresh |= 1u << entries[size_t(i)].row;
            for (int r = 0; r < chunk.rows; ++r)
                if (!(fresh >> r & 1)) a.zero(r);
        }
        a.move(r11, rsi);
        int32_t at = 0;  // r11 - rsi
        int source = 31;
        for (int64_t i = begin; i < end; ++i) {
            const Entry& entry = entries[size_t(i)];
            if (i == begin || entry.offset != entries[size_t(i - 1)].offset) {
                source = source == 31 ? 28 : source + 1;
                a.load(source, rdi, entry.offset * 4);
            }
            const int32_t value = int32_t(i - begin) * 4;
            if (value - at > 127 * 4) {  // keep displacements within one byte
                a.add(r11, value + 128 * 4 - at);
                at = value + 128 * 4;
            }
            if (fresh >> entry.row & 1)
                a.multiply_broadcast(entry.row, source, r11, value - at);
            else
                a.fma_broadcast(entry.row, source, r11, value - at);
            fresh &= ~(1u << entry.row);
            if (const int64_t count = i - begin + 1; count % per_fetch == 0)
                a.prefetch(rbx, int32_t(count / per_fetch - 1) * 64);
            for (int64_t line = lines * (i - begin) / (end - begin); line < lines * (i - begin + 1) / (end - begin);
                 ++line) {
                const int64_t run = line / program->run_lines, of_run = line % program->run_lines;
                if (of_run == 0) a.load(rbp, r13, int32_t(run * 8));
                a.prefetch(rbp, int32_t(of_run * kLineBytes));
            }
            program->order.push_back(q.perm ? q.perm[entry.index] : entry.index);
        }
        a.move(r10, rdx);
        for (int r = 0; r < chunk.rows; ++r) {
            a.store(r, r10, 0);
            a.add(r10, rax);
        }
        a.add(rdi, r8);
        a.add(rdx, r9);
        a.add(rbx, int32_t(fetches * 64));
        if (chunk.fetched > 0) a.add(r13, int32_t(chunk.fetched * 8));
        a.repeat_from(top, rcx);
        a.end_vectors();
        if (chunk.fetched > 0) {
            a.pop(r13);
            a.pop(rbp);
        }
        a.pop(rbx);
        a.ret();
    }
};

class GeneratedGather {
  public:
    explicit GeneratedGather(const Product& product)
        : q(product), g(product.geometry), in_place(reads_in_place(product)) {
        for (int64_t i = 0; i < q.plane_count; ++i)
            tilings.push_back(in_place ? in_place_tiling(q) : Tiling(g, q.planes[i], generated_limits(q)));
        split_work();
        bypass = result_bytes(q) > kBypassBytes;
    }

    // False if there is no program, for the reason in `problem` if that is not null.
    bool prepare(const char** problem) {
        const int64_t rows = g.groups * g.rows_per_group;
        if ((*problem = check_ends(q.planes[0].row_ptr[0], q.planes[q.plane_count - 1].row_ptr[rows], q.nnz)))
            return false;
        for (int64_t i = 0; i < q.plane_count; ++i) {
            Programs::Key key = tilings[i].key(g);
            key.insert(key.begin(), {q.perm ? 1 : 0, q.bias ? 1 : 0, in_place ? 1 : 0, i});
            programs.push_back(q.programs->find_or_make<GatherProgram>(
                key, [&] { return GatherCompiler(q, tilings[i], q.planes[i], in_place).compile(problem); }));
            if (programs.back() == nullptr) return false;
            first_value.push_back(first_value.back() + int64_t(programs.back()->order.size()));
        }
        return true;
    }

    void run() {
        thread_local Scratch shared_values, shared_moments;
        float* values = shared_values.floats(size_t(q.nnz) + 1);
        const int64_t rows = g.groups * g.rows_per_group;
        measuring = q.moments != nullptr && q.plane_count == 1 && q.dest.n == 1;
        if (measuring) part_moments = shared_moments.of<PartMoments>(size_t(tilings[0].tiles() * rows));
#pragma omp parallel num_threads(q.threads)
        {
            for (int64_t plane = 0; plane < q.plane_count; ++plane) {
                const std::vector<int32_t>& order = programs[plane]->order;
                float* to = values + first_value[plane];
#pragma omp for schedule(static)
                for (int64_t i = 0; i < int64_t(order.size()); ++i) to[i] = q.values[order[i]];
            }
            thread_local Scratch panel_scratch, stage_scratch;
            if (in_place) {
                compute_stretches(values, panel_scratch, stage_scratch);
#pragma omp barrier
            } else {
#pragma omp for schedule(dynamic, 1)
                for (int64_t i = 0; i < items.back(); ++i) compute(i, i, values, panel_scratch, stage_scratch);
            }
            if (bypass) finish_stores_around();
            if (measuring) {
#pragma omp for schedule(static)
                for (int64_t row = 0; row < rows; ++row) join_moments(row);
            }
        }
        if (measuring) q.moments->measured = true;
    }

  private:
    const Product& q;
    const Geometry& g;
    const bool in_place;  // whether the source is read where it lies
    std::atomic<int64_t> stretches_taken{0};
    std::vector<Tiling> tilings;
    std::vector<std::shared_ptr<const GatherProgram>> programs;
    std::vector<int64_t> first_value{0};
    std::vector<int64_t> items{0};  // running count of work items per plane
    bool bypass = false;            // whether the destination is too large to wait in a cache
    bool measuring = false;
    PartMoments* part_moments = nullptr;  // of every tile and row
    int64_t parts = 1;                    // row parts of a tile, where tiles alone do not keep the threads busy

    void split_work() {
        int64_t tiles = 0;
        for (const Tiling& t : tilings) tiles += t.tiles();
        const int64_t most = std::min<int64_t>(4 * q.threads, g.groups * g.rows_per_group / kGatherRows);
        const TileCost cost(tilings[0], g, q.nnz / q.plane_count);
        for (int64_t i = 2; i <= most; ++i)
            if (cost.all(tiles, i, q.threads) < cost.all(tiles, parts, q.threads)) parts = i;
        for (const Tiling& t : tilings) items.push_back(items.back() + t.tiles() * parts);
    }

    void join_moments(int64_t row) const {
        const int64_t rows = g.groups * g.rows_per_group;
        JoinedMoments joined;
        for (int64_t i = 0; i < tilings[0].tiles(); ++i) {
            const Tile tile(tilings[0], g, q.planes[0], i);
            joined.add(part_moments[i * rows + row], tile.rows * tile.cols * tile.lanes);
        }
        q.moments->mean[row] = joined.average();
        q.moments->variance[row] = joined.variance();
    }

    // Some items that follow one another at a time, each of which is computed while the next one's source is fetched:
    // the next ones are therefore taken before the last.
    void compute_stretches(const float* values, Scratch& panel_scratch, Scratch& stage_scratch) {
        const int64_t all = items.back(), length = std::max<int64_t>(all / (8 * q.threads), 1);
        const auto take = [&] { return std::min(stretches_taken++ * length, all); };
        for (int64_t first = take(), then; first < all; first = then) {
            const int64_t end = std::min(first + length, all);
            for (int64_t i = first; i + 1 < end; ++i) compute(i, i + 1, values, panel_scratch, stage_scratch);
            then = take();
            compute(end - 1, then < all ? then : end - 1, values, panel_scratch, stage_scratch);
        }
    }

    // `next`: the item that this thread computes after it, if it is another one.
    void compute(int64_t item, int64_t next, const float* values, Scratch& panel_scratch, Scratch& stage_scratch) {
        const int64_t plane = std::upper_bound(items.begin(), items.end(), item) - items.begin() - 1;
        const Plane& p = q.planes[plane];
        const Tiling& t = tilings[plane];
        const GatherProgram& program = *programs[plane];
        const int64_t part = (item - items[plane]) % parts;
        const int64_t number = (item - items[plane]) / parts;
        const Tile tile(t, g, p, number);
        TileMoments<kGatherRows> moments;
        const int64_t rows = g.groups * g.rows_per_group;
        const int64_t unit = q.dest.n == 1 ? 1 : kBandRows, units = (rows + unit - 1) / unit;
        const int64_t first = units * part / parts * unit, last = std::min(units * (part + 1) / parts * unit, rows);
        const Run run(t, tile);
        const View& d = q.dest;

        const bool follow = tile.cols == 1 || (d.x * g.dest_step_x == t.lanes && tile.lanes == t.lanes);
        // Taps read what their neighbours have read. It is still in the first-level cache if a position's vectors do
        // not follow one another, but those of the same samples at neighbouring positions.
        const bool shared = g.taps_w > 1 && tile.cols > 1 && d.n == 1 && follow && t.lanes % kLanes == 0;
        const int64_t groups = shared ? t.lanes / kLanes : 1;
        // A chunk's rows are staged and then written one after another: 28 interleaved streams of stores to as
        // many pages take twice the time. Sums of a reduction in blocks wait there for the next block.
        const int64_t stage_rows = t.blocks > 1 ? rows : kBandRows;
        const int64_t stage_row = d.n == 1 ? (tile.rows * run.vectors + 1) * kLanes : kLanes;
        const int64_t stage_vector = d.n == 1 ? kLanes : stage_rows * kLanes;
        const float* source = static_cast<const float*>(q.source.data) + tile.n;  // if it is read in place
        float* panel = in_place ? nullptr : panel_scratch.floats(size_t(t.panel_floats() + run.vectors * kLanes));
        float* stage = stage_scratch.floats(size_t(stage_rows * (tile.rows * run.vectors + 1) * kLanes));
        int64_t index = 0;
        thread_local FetchList ahead;
        if (in_place) {
            list_lines(program, (next - items[plane]) / parts, next != item, &ahead);
            ahead.end(size_t(run.vectors) * program.runs(), stage);
        }

        for_each_panel(t, g, 0, rows, [&](int64_t, int64_t, int64_t, int64_t channel, int64_t count) {
            if (!in_place) pack(t, tile, q, channel, count, panel);
            const float* from = in_place ? source : panel;
            const int64_t end = program.panel[size_t(index) + 1];
            for (int64_t i = program.panel[size_t(index)]; i < end; ++i) {
                const GatherChunk& chunk = program.chunks[size_t(i)];
                if (chunk.row < first || chunk.row >= last) continue;
                const int64_t slot = t.blocks > 1 ? chunk.row : d.n == 1 ? 0 : chunk.row % kBandRows;
                float* to = stage + slot * stage_row;
                const auto code = program.code->entry<GatherCode>(chunk.entry);
                const float* bias = q.bias ? q.bias + chunk.row : nullptr;
                const int64_t follower = i + 1 < int64_t(program.chunks.size()) ? i + 1 : 0;
                const uint8_t* following = program.code->entry<const uint8_t*>(program.chunks[size_t(follower)].entry);
                const auto compute_slice = [&](const Slice& slice) {
                    for (int64_t r = 0; r < slice.rows; ++r)
                        for (int64_t i = 0; i < slice.groups; ++i)
                            code(from + (slice.row + r) * t.row_stride + (slice.first() + i) * run.step,
                                 values + first_value[plane] + chunk.value, to + (r * slice.vectors() + i) * kLanes,
                                 slice.columns, groups * run.step * 4, slice.groups * stage_vector * 4, stage_row * 4,
                                 bias, following, ahead.take(chunk.fetched * slice.columns));
                };
                const int64_t stop = chunk.row + chunk.rows, band = (stop - 1) / kBandRows * kBandRows;
                moments.begin();
                if (d.n == 1 && chunk.begins && chunk.ends) {
                    for_each_slice(tile, run.vectors / groups, groups, follow, chunk.rows, [&](const Slice& slice) {
                        compute_slice(slice);
                        scatter_rows(p, t, tile, run, follow, slice, chunk.row, stop, to, stage_row, moments);
                    });
                    if (measuring) keep_moments(moments, chunk, tile, number);
                    continue;
                }
                const Slice whole{0, tile.rows, 0, run.vectors / groups, 0, groups, groups};
                compute_slice(whole);
                if (!chunk.ends) continue;
                if (d.n == 1) {
                    scatter_rows(p, t, tile, run, follow, whole, chunk.row, stop, to, stage_row, moments);
                    if (measuring) keep_moments(moments, chunk, tile, number);
                } else if (stop % kBandRows == 0 || stop == rows) {
                    scatter_band(tile, run, band, stop, stage + (t.blocks > 1 ? band : 0) * stage_row, stage_vector);
                }
            }
            ++index;
        });
    }

    // What is to be fetched of a tile that is read in place.
    void list_lines(const GatherProgram& program, int64_t number, bool wanted, FetchList* list) const {
        list->begin(program.run_lines);
        if (!wanted) return;
        const Tile tile(tilings[0], g, q.planes[0], number);
        const float* from = static_cast<const float*>(q.source.data) + tile.n;
        for (int64_t c = 0; c < g.groups * g.channels_per_group; ++c, from += q.source.c)
            list->add(from, tile.lanes * int64_t(sizeof(float)));
    }

    // A part of a tile: `rows` rows of positions from `row` on, of each of them `columns` from `column` on, and of
    // these `groups` of samples, each a vector, from `group` on, of `all` that there are.
    struct Slice {
        int64_t row, rows, column, columns, group, groups, all;
        int64_t vectors() const { return columns * groups; }
        int64_t first() const { return column * all + group; }  // vector of a row
    };

    // Slices whose results wait in the first-level cache until they are written: if that has room for all samples of a
    // position, no slice has less, and what is written of a row is one run.
    template <class Body>
    static void for_each_slice(const Tile& tile, int64_t columns, int64_t groups, bool follow, int64_t chunk_rows,
                               Body body) {
        const int64_t fit = std::max<int64_t>(kSliceBytes / (kLanes * 4 * chunk_rows), 1);
        const int64_t most = fit < groups ? fit : fit / groups;
        const int64_t parts = follow ? (columns + most - 1) / most : 1, widest = (columns + parts - 1) / parts;
        const int64_t deepest = std::clamp<int64_t>(fit / widest, 1, groups);
        const int64_t rows = deepest < groups ? 1 : std::clamp<int64_t>(fit / (widest * groups), 1, tile.rows);
        for (int64_t r = 0; r < tile.rows; r += rows)
            for (int64_t i = 0; i < groups; i += deepest)
                for (int64_t c = 0; c < columns; c += widest)
                    body(Slice{r, std::min(rows, tile.rows - r), c, std::min(widest, columns - c), i,
                               std::min(deepest, groups - i), groups});
    }

    // `follow`: whether the positions of a row lie one after another in the destination.
    void scatter_rows(const Plane& p, const Tiling& t, const Tile& tile, const Run& run, bool follow,
                      const Slice& slice, int64_t row, int64_t end, float* from, int64_t row_step,
                      TileMoments<kGatherRows>& moments) const {
        with_element(q.element, [&](auto element) {
            scatter_rows_as<decltype(element)>(p, t, tile, run, follow, slice, row, end, from, row_step, moments);
        });
    }
    template <class T>
    void scatter_rows_as(const Plane& p, const Tiling& t, const Tile& tile, const Run& run, bool follow,
                         const Slice& slice, int64_t row, int64_t end, float* from, int64_t row_step,
                         TileMoments<kGatherRows>& moments) const {
        const View& d = q.dest;
        T* to = static_cast<T*>(d.data);
        const int64_t column = d.x * g.dest_step_x, first = slice.first() * kLanes;
        const bool apart = slice.groups < slice.all;  // the columns, of some of the samples
        const int64_t pieces = apart ? slice.columns : follow ? 1 : tile.cols;
        const int64_t staged = apart ? slice.groups * kLanes : t.lanes;  // of one piece
        const int64_t length = apart    ? staged
                               : follow ? std::min(run.floats - first, slice.vectors() * kLanes)
                                        : tile.lanes;
        const int64_t ahead = rows_ahead(length * pieces * slice.rows * int64_t(sizeof(float)));
        const int64_t row_floats = slice.vectors() * kLanes;
        const bool gapless = pieces * length == row_floats;  // all that is staged of a row is results
        with_result<T>(q, [&](auto result) {
            for (int slot = 0; row < end; ++row, ++slot, from += row_step) {
                for (int64_t r = 0; r < slice.rows; ++r)
                    for (int64_t c = 0; c < pieces; ++c) {
                        const int64_t at = row * d.c + (p.dest_y + (tile.y + slice.row + r) * g.dest_step_y) * d.y +
                                           p.dest_x * d.x + (tile.x + c) * column + tile.n + first;
                        float* run_of_results = from + r * row_floats + c * staged;
                        if (row + ahead < end) result.fetch(at + ahead * d.c, length);
                        result.finish(row, run_of_results, at, length);
                        if (measuring && !gapless) moments.add<T>(slot, run_of_results, length);
                        write_run(to + at, run_of_results, length, bypass);
                    }
                if (measuring && gapless) moments.add<T>(slot, from, slice.rows * row_floats);
            }
        });
    }

    void keep_moments(const TileMoments<kGatherRows>& moments, const GatherChunk& chunk, const Tile& tile,
                      int64_t number) const {
        PartMoments* to = part_moments + number * g.groups * g.rows_per_group + chunk.row;
        for (int row = 0; row < chunk.rows; ++row) to[row] = moments.of(row, tile.rows * tile.cols * tile.lanes);
    }

    void scatter_band(const Tile& tile, const Run& run, int64_t row, int64_t end, const float* from,
                      int64_t step) const {
        const View& d = q.dest;
        with_element(q.element, [&](auto element) {
            auto* to = static_cast<decltype(element)*>(d.data) + tile.n * d.n;
            for (int64_t v = 0; v < run.vectors; ++v)
                for (int64_t r = row; r < end; r += 16)
                    transpose16(from + v * step + (r - row) * kLanes, kLanes, std::min<int64_t>(16, end - r),
                                to + r + v * kLanes * d.n, d.n, std::min<int64_t>(kLanes, tile.lanes - v * kLanes),
                                false, bypass);
        });
    }
};

}  // namespace

const char* generated_gather_product(const Product& product) {
    if (!worth_generating(product, 2)) return gather_product(product);
    return clearing_empty_planes(product, [](const Product& q) {
        GeneratedGather gather(q);
        const char* problem = nullptr;
        if (gather.prepare(&problem))
            gather.run();
        else if (problem == nullptr)
            return gather_product(q);
        return problem;
    });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
