// Sampled product by generated code: the weight gradient, 28 nonzeros at a time in registers.
//
// The rows of G are taken in blocks whose lanes stay in the first-level cache. A block's nonzeros, ordered by where
// they read the source, are cut into groups of 28 accumulators: a source vector is loaded once for all nonzeros of
// its column in the block, and a nonzero is one fused multiply-add with its row of G as memory operand. A group
// runs over a few vectors of lanes; then one shared routine sums the 28 accumulators across their lanes.
#include <atomic>
#include <omp.h>

#include "assembler.h"
#include "executable.h"
#include "generated.h"
#include "kernels.h"
#include "programs.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

constexpr int64_t kBlockRows = 48;
constexpr int64_t kBlockVectors = 9;  // of lanes: with 48 rows 27 KB of G, and few sums of lanes
constexpr int32_t kBlockLines = kBlockRows / kLanes;
constexpr int64_t kGroup = 28;       // accumulators; the other four registers hold source vectors
constexpr int64_t kGroupSlots = 32;  // floats that a group's sums take: two vectors
constexpr int32_t kNoSlot = -1;      // of a nonzero that reads nothing but padding: its gradient is zero

// next: the part of G that is staged after this one, sample by sample `next_step` bytes apart. If its layout is
// channels-last, some of it is fetched with every group, rather than all at once, for which the core would wait.
using SampledCode = void (*)(const float* x, const float* grad, float* sums, int64_t vectors, int64_t x_step,
                             int64_t grad_step, int64_t mask, const char* next, int64_t next_step);

struct SampledBlock {  // some rows of one panel
    int64_t row, rows, entry, slot;
};

struct SampledProgram : Program {
    std::unique_ptr<Executable> code;
    std::vector<SampledBlock> blocks;
    std::vector<int64_t> panel{0};  // blocks of panel i: panel[i] up to panel[i + 1]
    std::vector<int32_t> slot;      // where every nonzero's sum ends up
    int64_t slots = 0;
};

class SampledCompiler {
  public:
    SampledCompiler(const Product& product, const Tiling& tiling)
        : q(product), t(tiling), g(product.geometry), nonzeros(product, tiling, product.planes[0]) {}

    // Null if the pattern is malformed (`problem` says how) or the system allows no generated code.
    std::shared_ptr<const SampledProgram> compile(const char** problem) {
        const int64_t rows = g.groups * g.rows_per_group;
        if ((*problem = nonzeros.prepare())) return nullptr;
        emit_sums();
        program->slot.assign(size_t(q.nnz), kNoSlot);
        for_each_panel(t, g, 0, rows, [&](int64_t row0, int64_t row1, int64_t block, int64_t, int64_t) {
            for (int64_t row = row0; row < row1;) {
                const int64_t group_end = (row / g.rows_per_group + 1) * g.rows_per_group;
                const int64_t end = std::min({row + kBlockRows, row1, group_end});
                add_block(row, end, block);
                row = end;
            }
            program->panel.push_back(int64_t(program->blocks.size()));
        });
        program->code.reset(new Executable(assembler.data(), size_t(assembler.size())));
        return program->code->valid() ? program : nullptr;
    }

  private:
    using Entry = SortedNonzeros::Entry;
    const Product& q;
    const Tiling& t;
    const Geometry& g;
    Assembler assembler;
    std::shared_ptr<SampledProgram> program = std::make_shared<SampledProgram>();
    SortedNonzeros nonzeros;
    int64_t sums_entry = 0;
    int lane[kGroup];  // of its vector of sums, for every accumulator

    // sums += (sum of z0's lanes, of z1's, ...) in the order of `lane`; then the next group's place, zeroed
    // accumulators and rewound pointers.
    void emit_sums() {
        Assembler& a = assembler;
        a.reserve(400);
        sums_entry = a.size();
        for (int half = 0; half < 2; ++half) {
            std::vector<int> live;
            for (int z = 16 * half; z < std::min<int>(kGroup, 16 * half + 16); ++z) live.push_back(z);
            const int total = emit_tree(live, 28 + half);
            a.add(total, total, rdx, 64 * half);
            a.store(total, rdx, 64 * half);
            for (int i = 0; i < int(live.size()); ++i) lane[16 * half + i] = lane_of(i);
        }
        for (int z = 0; z < kGroup; ++z) a.zero(z);
        a.add(rdx, int32_t(kGroupSlots * 4));
        a.move(rdi, r10);
        a.move(rsi, r11);
        a.move(rcx, rax);
        a.ret();
    }
    // Pairs are added while their partial sums are interleaved: within quarters twice, then across them.
    int emit_tree(std::vector<int> live, int spare) {
        Assembler& a = assembler;
        for (int level = 0; level < 4; ++level) {
            std::vector<int> next;
            for (size_t i = 0; i < live.size(); i += 2) {
                const int u = live[i], v = i + 1 < live.size() ? live[i + 1] : u;
                if (level == 0) {
                    a.unpack_low(spare, u, v);
                    a.unpack_high(u, u, v);
                } else if (level == 1) {
                    a.unpack_low_pairs(spare, u, v);
                    a.unpack_high_pairs(u, u, v);
                } else {
                    a.shuffle_quarters(spare, u, v, 0x88);
                    a.shuffle_quarters(u, u, v, 0xDD);
                }
                a.add(u, u, spare);
                next.push_back(u);
            }
            live = next;
        }
        return live[0];
    }
    // Leaf i = 8d + 4c + 2b + a of the tree ends in quarter 2d + c, at float 2b' + a' of it: unpacking floats puts
    // the pair's first operand at even places, unpacking pairs puts it into the lower half.
    static int lane_of(int i) {
        const int a = i & 1, b = i >> 1 & 1, c = i >> 2 & 1, d = i >> 3;
        return 4 * (2 * d + c) + 2 * b + a;
    }

    void add_block(int64_t row, int64_t end, int64_t block) {
        const std::vector<Entry>& entries = nonzeros.sort(row, end, block);
        if (entries.empty() && block > 0) return;  // in the first, all rows have a block: for the sums of G
        Assembler& a = assembler;
        // A channels-last G: the next block's rows are a few lines of every sample.
        const size_t groups = (entries.size() + kGroup - 1) / kGroup;
        const size_t samples = q.grad.n != 1 ? size_t(std::min(t.lanes, kBlockVectors * kLanes)) : 0;
        a.reserve(2 * entries.size() + 8 * groups + samples * size_t(kBlockLines + 1) + 60);
        program->blocks.push_back({row, end - row, a.size(), program->slots});
        a.push(rbx);
        a.load_argument(rax, 8 + 8);
        a.load_argument(rbx, 8 + 16);
        a.mask1_from_eax();
        a.move(r10, rdi);
        a.move(r11, rsi);
        a.move(rax, rcx);
        for (int z = 0; z < kGroup; ++z) a.zero(z);
        for (size_t begin = 0; begin < entries.size(); begin += kGroup) {
            const size_t stop = std::min(begin + size_t(kGroup), entries.size());
            const size_t group = begin / kGroup;
            for (size_t n = group * samples / groups; n < (group + 1) * samples / groups; ++n) {
                for (int32_t line = 0; line < kBlockLines; ++line) a.prefetch(rbx, line * 64);
                a.add_argument(rbx, 8 + 24);
            }
            const int64_t top = a.size();
            int source = 31;
            for (size_t i = begin; i < stop; ++i) {
                const Entry& entry = entries[i];
                if (i == begin || entry.offset != entries[i - 1].offset) {
                    source = source == 31 ? 28 : source + 1;
                    a.load(source, rdi, entry.offset * 4);
                }
                const int z = int(i - begin);
                a.fma_masked(z, source, rsi, entry.row * kLanes * 4);
                program->slot[size_t(entry.index)] = int32_t(program->slots + z / 16 * 16 + lane[z]);
            }
            a.add(rdi, r8);
            a.add(rsi, r9);
            a.repeat_from(top, rcx);
            a.call(sums_entry);
            program->slots += kGroupSlots;
        }
        a.end_vectors();
        a.pop(rbx);
        a.ret();
    }
};

class GeneratedSampled {
  public:
    explicit GeneratedSampled(const Product& product)
        : q(product), g(product.geometry), p(product.planes[0]), t(g, p, generated_limits(product)) {}

    // False if there is no program, for the reason in `problem` if that is not null.
    bool prepare(const char** problem) {
        if ((*problem = check_ends(p.row_ptr[0], p.row_ptr[g.groups * g.rows_per_group], q.nnz))) return false;
        Programs::Key key = t.key(g);
        key.insert(key.begin(), {2, q.grad.n != 1 ? 1 : 0});
        program =
            q.programs->find_or_make<SampledProgram>(key, [&] { return SampledCompiler(q, t).compile(problem); });
        return program != nullptr;
    }

    void run() {
        // Threads share out tiles, each summing its own; or, where tiles are too few for that, the rows of every tile.
        const int64_t limit = std::max<int64_t>(1, kPartialBytes / 4 / std::max<int64_t>(part_floats(), 1));
        const TileCost cost(t, g, q.nnz);
        double least = 0;
        for (int64_t i = 1; i <= std::min<int64_t>({t.tiles(), limit, q.threads}); ++i) {
            const int64_t each = q.threads / i;
            const double time = double((t.tiles() + i - 1) / i) * (cost.pack + cost.compute / double(each));
            if (i > 1 && time >= least) continue;
            least = time;
            tile_parts = i;
            row_parts = each;
        }
        thread_local Scratch shared_sums;
        // Sums of rows lie behind those of nonzeros, lane by lane.
        sums = shared_sums.floats(size_t(tile_parts * part_floats()));
#pragma omp parallel num_threads(q.threads)
        {
            thread_local Scratch panel_scratch, stage_scratch;
#pragma omp for schedule(static)
            for (int64_t part = 0; part < tile_parts * row_parts; ++part)
                sum_tiles(part / row_parts, part % row_parts, panel_scratch, stage_scratch);
#pragma omp for schedule(static)
            for (int64_t j = 0; j < q.nnz; j += kLanes) write_totals(j, int(std::min<int64_t>(kLanes, q.nnz - j)));
            if (q.row_sums) {
#pragma omp for schedule(static)
                for (int64_t row = 0; row < rows(); ++row) {
                    float total = 0;
                    for (int64_t i = 0; i < tile_parts; ++i)
                        total += sum(load(sums + i * part_floats() + program->slots + row * kLanes));
                    q.row_sums[row] = total;
                }
            }
        }
    }

  private:
    const Product& q;
    const Geometry& g;
    const Plane& p;
    const Tiling t;
    std::shared_ptr<const SampledProgram> program;
    int64_t tile_parts = 1, row_parts = 1;
    float* sums = nullptr;
    static constexpr int64_t kPartialBytes = 256 << 20;

    int64_t rows() const { return g.groups * g.rows_per_group; }
    int64_t part_floats() const { return program->slots + (q.row_sums ? rows() * kLanes : 0); }

    // Blocks of `panel` that row part `i` of row_parts begins with: cut by nonzeros.
    int64_t cut(int64_t panel, int64_t i) const {
        const int64_t begin = program->panel[size_t(panel)], end = program->panel[size_t(panel) + 1];
        if (i == row_parts || begin == end) return i == 0 ? begin : end;
        const int64_t from = program->blocks[size_t(begin)].slot;
        const int64_t to = end < int64_t(program->blocks.size()) ? program->blocks[size_t(end)].slot : program->slots;
        int64_t block = begin;
        while (block < end && program->blocks[size_t(block)].slot < from + (to - from) * i / row_parts) ++block;
        return block;
    }

    // The gradients of nonzeros [j, j + count), at most a vector: every tile part's sum of each.
    void write_totals(int64_t j, int count) const {
        const __mmask16 there = __mmask16((1u << count) - 1);
        const __m512i slot = _mm512_maskz_loadu_epi32(there, program->slot.data() + j);
        const __mmask16 summed = _mm512_mask_cmpneq_epi32_mask(there, slot, _mm512_set1_epi32(kNoSlot));
        vec total{};
        for (int64_t i = 0; i < tile_parts; ++i)
            total += vec(_mm512_mask_i32gather_ps(_mm512_setzero_ps(), summed, slot, sums + i * part_floats(), 4));
        store(q.value_grad + j, total, count);
    }

    void sum_tiles(int64_t tile_part, int64_t row_part, Scratch& panel_scratch, Scratch& stage_scratch) {
        float* to = sums + tile_part * part_floats();
        for (int64_t panel = 0; panel + 1 < int64_t(program->panel.size()); ++panel) {
            const int64_t begin = cut(panel, row_part), end = cut(panel, row_part + 1);
            if (begin == end) continue;
            const int64_t first = program->blocks[size_t(begin)].slot;
            const int64_t last =
                end < int64_t(program->blocks.size()) ? program->blocks[size_t(end)].slot : program->slots;
            std::memset(to + first, 0, size_t(last - first) * sizeof(float));
            for (int64_t i = begin; q.row_sums && i < end; ++i) {
                const SampledBlock& block = program->blocks[size_t(i)];
                std::memset(to + program->slots + block.row * kLanes, 0, size_t(block.rows * kLanes) * sizeof(float));
            }
        }
        const int64_t tiles = t.tiles();
        for (int64_t i = tiles * tile_part / tile_parts; i < tiles * (tile_part + 1) / tile_parts; ++i)
            sum_tile(Tile(t, g, p, i), row_part, to, panel_scratch, stage_scratch);
    }

    void sum_tile(const Tile& tile, int64_t row_part, float* to, Scratch& panel_scratch, Scratch& stage_scratch) {
        const Run run(t, tile);
        float* panel = panel_scratch.floats(size_t(t.panel_floats() + run.vectors * kLanes));
        float* stage = stage_scratch.floats(size_t(kBlockRows * run.vectors * kLanes));
        int64_t index = 0;
        for_each_panel(t, g, 0, rows(), [&](int64_t, int64_t, int64_t part, int64_t channel, int64_t count) {
            const int64_t begin = cut(index, row_part), end = cut(index, row_part + 1);
            ++index;
            if (begin == end) return;
            pack(t, tile, q, channel, count, panel);
            for (int64_t i = begin; i < end; ++i)
                for (int64_t r = 0; r < tile.rows; ++r) {
                    const bool last = r + 1 == tile.rows;
                    const SampledBlock& block = program->blocks[size_t(i)];
                    const SampledBlock& next = program->blocks[size_t(last && i + 1 < end ? i + 1 : i)];
                    stage_grad(block, tile, run, r, stage);
                    if (q.row_sums && part == 0) sum_staged(block, run, stage, to + program->slots);
                    sum_row(block, run, panel + r * t.row_stride, stage, to, grad_of(next, tile, last ? 0 : r + 1));
                }
        });
    }

    static void sum_staged(const SampledBlock& block, const Run& run, const float* stage, float* to) {
        for (int64_t row = 0; row < block.rows; ++row) {
            vec total = load(to + (block.row + row) * kLanes);
            for (int64_t v = 0; v < run.vectors; ++v) total += load(stage + (v * block.rows + row) * kLanes);
            store(to + (block.row + row) * kLanes, total);
        }
    }

    // One block of rows over one tile row, in stretches of lanes for which its part of G fits the first-level cache.
    // `next`: the part of G that is staged after this one.
    void sum_row(const SampledBlock& block, const Run& run, const float* x, const float* stage, float* to,
                 const char* next) {
        const auto code = program->code->entry<SampledCode>(block.entry);
        const int64_t vector = block.rows * kLanes, whole = run.floats / kLanes, tail = run.floats % kLanes;
        const int64_t next_step = q.grad.n * element_bytes(q.element);
        auto sum_vectors = [&](int64_t first, int64_t count, int64_t mask) {
            code(x + first * run.step, stage + first * vector, to + block.slot, count, run.step * 4, vector * 4, mask,
                 next + first * kLanes * next_step, next_step);
        };
        const int64_t stretches = (whole + kBlockVectors - 1) / kBlockVectors;
        for (int64_t i = 0; i < stretches; ++i) {
            const int64_t first = whole * i / stretches;
            sum_vectors(first, whole * (i + 1) / stretches - first, 0xFFFF);
        }
        // Beyond the run's end the panel holds other positions, whose NaN or Inf must not leak in.
        if (tail) sum_vectors(whole, 1, (1 << tail) - 1);
    }

    const char* grad_of(const SampledBlock& block, const Tile& tile, int64_t r) const {
        const View& d = q.grad;
        return static_cast<const char*>(d.data) +
               (block.row * d.c + (tile.y + r) * d.y + tile.x * d.x + tile.n * d.n) * element_bytes(q.element);
    }

    // The block's rows of G over one tile row, as [vector][row][lane].
    void stage_grad(const SampledBlock& block, const Tile& tile, const Run& run, int64_t r, float* stage) const {
        with_element(q.element, [&](auto element) {
            stage_grad_as(block, tile, run, r, static_cast<const decltype(element)*>(q.grad.data), stage);
        });
    }
    template <class T>
    void stage_grad_as(const SampledBlock& block, const Tile& tile, const Run& run, int64_t r, const T* from,
                       float* stage) const {
        const View& d = q.grad;
        from += block.row * d.c + (tile.y + r) * d.y + tile.x * d.x + tile.n * d.n;
        const int64_t vector = block.rows * kLanes;
        if (d.n != 1) {
            for (int64_t v = 0; v < run.vectors; ++v)
                for (int64_t i = 0; i < block.rows; i += 16) {
                    const T* corner = from + i + v * kLanes * d.n;
                    const int64_t samples = std::min<int64_t>(kLanes, tile.lanes - v * kLanes);
                    transpose16(corner, d.n, samples, stage + v * vector + i * kLanes, kLanes,
                                std::min<int64_t>(16, block.rows - i), true);
                }
            return;
        }
        const bool follow = tile.cols == 1 || (d.x == t.lanes && tile.lanes == t.lanes);
        const int64_t whole = follow ? run.floats / kLanes : 0;
        const int64_t ahead = rows_ahead(run.floats * int64_t(sizeof(T)));
        for (int64_t i = 0; i < block.rows; ++i, from += d.c, stage += kLanes) {
            if (follow && i + ahead < block.rows)
                for (int64_t v = 0; v < whole * kLanes; v += 64 / sizeof(T)) prefetch(from + ahead * d.c + v);
            for (int64_t v = 0; v < whole; ++v) store(stage + v * vector, load(from + v * kLanes));
            // Lane by lane: position and sample, missing samples as zeros.
            for (int64_t lane = whole * kLanes; lane < run.vectors * kLanes; ++lane) {
                const int64_t column = lane / t.lanes, sample = lane % t.lanes;
                const bool there = lane < run.floats && sample < tile.lanes;
                stage[lane / kLanes * vector + lane % kLanes] = there ? widen(from[column * d.x + sample]) : 0.0f;
            }
        }
    }
};

}  // namespace

const char* generated_sampled_product(const Product& product) {
    if (!worth_generating(product, 4)) return sampled_product(product);
    if (full_sampled_product(product)) return nullptr;
    GeneratedSampled sampled(product);
    const char* problem = nullptr;
    if (sampled.prepare(&problem))
        sampled.run();
    else if (problem == nullptr)
        return sampled_product(product);
    return problem;
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
