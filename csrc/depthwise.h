// Both products of depthwise convolutions in batch-last layout, where a channel is one contiguous block: no packing.
// A row of positions reads a few rows of its own channel, which stay in the first-level cache, so that the
// products run at the speed of memory.
#pragma once
#include <atomic>
#include <omp.h>

#include "bypass.h"
#include "panel.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

inline bool is_depthwise(const Product& q) {
    const Geometry& g = q.geometry;
    return g.rows_per_group == 1 && g.channels_per_group == 1 && g.groups > 1 && q.source.n == 1 &&
           (q.value_grad ? q.grad.n : q.dest.n) == 1;
}

class Depthwise {
  public:
    explicit Depthwise(const Product& product)
        : q(product), g(product.geometry), bypass(!q.value_grad && result_bytes(q) > kBypassBytes) {
        for (int64_t i = 0; i < q.plane_count; ++i) stretches.push_back(cut(q.planes[i]));
    }

    const char* run() {
        // The planes' rows follow one another.
        if (const char* text =
                check_ends(q.planes[0].row_ptr[0], q.planes[q.plane_count - 1].row_ptr[g.groups], q.nnz))
            return text;
        std::atomic<const char*> problem{nullptr};
#pragma omp parallel num_threads(q.threads)
        {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < q.plane_count * g.groups; ++i)
                if (const char* text = check(q.planes[i / g.groups], i % g.groups)) problem = text;
            if (problem.load() == nullptr) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t channel = 0; channel < g.groups; ++channel)
                    for (int64_t i = 0; i < q.plane_count; ++i) compute(i, channel);
                if (bypass) finish_stores_around();
            }
        }
        return problem;
    }

  private:
    static constexpr int kMaxTogether = 12;  // taps whose sums stay in registers

    struct Entry {                         // a nonzero of the channel
        int64_t source_y, column, offset;  // source row at position 0; kernel column; floats from position 0
        float weight;
        int32_t index;
    };
    struct Tap {            // an entry at a stretch
        const float* from;  // of the stretch's first position
        float weight;
        int32_t index;
    };
    struct Stretch {  // positions of a row that the same taps reach
        int64_t first, end;
        std::vector<char> reached;  // by kernel column
    };

    const Product& q;
    const Geometry& g;
    const bool bypass;
    std::vector<std::vector<Stretch>> stretches;  // of each plane

    const char* check(const Plane& p, int64_t row) const {
        const int32_t begin = p.row_ptr[row], end = p.row_ptr[row + 1];
        if (begin < 0 || end < begin || end > q.nnz)
            return "row pointers are not ascending within the number of nonzeros";
        for (int32_t j = begin, before = -1; j < end; before = q.col[j++]) {
            const int32_t k = q.col[j];
            if (k <= before || k >= g.taps_h * g.taps_w)
                return "column indices are out of range or not ascending within a row";
            if (p.tap_y[k / g.taps_w] == kNoTap || p.tap_x[k % g.taps_w] == kNoTap)
                return "an entry's kernel position does not belong to its stride phase";
            if (q.perm && uint32_t(q.perm[j]) >= uint64_t(q.nnz)) return "permutation is out of range";
        }
        return nullptr;
    }

    std::vector<Stretch> cut(const Plane& p) const {
        // Kernel column k reaches the positions [first[k], end[k]): those whose source lies within the width.
        std::vector<int64_t> first(size_t(g.taps_w), p.width), end(size_t(g.taps_w), 0), cuts { 0, p.width };
        for (int64_t k = 0; k < g.taps_w; ++k) {
            const int64_t tap = p.tap_x[k], step = g.step_x;
            if (tap == kNoTap) continue;
            first[k] = std::min(tap >= 0 ? 0 : (-tap + step - 1) / step, p.width);
            end[k] = std::clamp<int64_t>(tap >= g.source_w ? 0 : (g.source_w - 1 - tap) / step + 1, 0, p.width);
            cuts.insert(cuts.end(), {first[k], end[k]});
        }
        std::sort(cuts.begin(), cuts.end());
        std::vector<Stretch> found;
        for (size_t i = 1; i < cuts.size(); ++i) {
            if (cuts[i - 1] == cuts[i]) continue;
            found.push_back({cuts[i - 1], cuts[i], {}});
            for (int64_t k = 0; k < g.taps_w; ++k)
                found.back().reached.push_back(first[k] <= cuts[i - 1] && cuts[i] <= end[k]);
        }
        return found;
    }

    void compute(int64_t plane, int64_t channel) {
        const Plane& p = q.planes[plane];
        const int32_t begin = p.row_ptr[channel], end = p.row_ptr[channel + 1];
        thread_local std::vector<Entry> entries;
        thread_local std::vector<Tap> taps;
        thread_local std::vector<float> sums;
        find_entries(p, begin, end, &entries);
        sums.assign(q.value_grad ? size_t(end - begin) * kLanes : 0, 0.0f);
        for (int64_t y = 0; y < p.height; ++y)
            for (const Stretch& stretch : stretches[size_t(plane)]) {
                find_taps(entries, channel, y, stretch, &taps);
                if (q.value_grad)
                    add_products(channel, y, stretch, taps, sums.data());
                else
                    write_sums(p, channel, y, stretch, taps);
            }
        if (q.value_grad)
            for (int32_t j = begin; j < end; ++j) q.value_grad[j] = sum(load(sums.data() + (j - begin) * kLanes));
    }

    void find_entries(const Plane& p, int32_t begin, int32_t end, std::vector<Entry>* entries) const {
        entries->clear();
        for (int32_t j = begin; j < end; ++j) {
            const int64_t row = q.col[j] / g.taps_w, column = q.col[j] % g.taps_w;
            entries->push_back({p.tap_y[row], column, p.tap_y[row] * q.source.y + p.tap_x[column] * q.source.x,
                                q.values ? q.values[q.perm ? q.perm[j] : j] : 0.0f, j - begin});
        }
    }

    void find_taps(const std::vector<Entry>& entries, int64_t channel, int64_t y, const Stretch& stretch,
                   std::vector<Tap>* taps) const {
        const int64_t row = y * g.step_y;
        const int64_t at = channel * q.source.c + row * q.source.y + stretch.first * g.step_x * q.source.x;
        taps->clear();
        for (const Entry& entry : entries)
            if (row + entry.source_y >= 0 && row + entry.source_y < g.source_h &&
                stretch.reached[size_t(entry.column)])
                taps->push_back({q.source.data + at + entry.offset, entry.weight, entry.index});
    }

    // Positions that follow one another without a gap on both sides are one run of lanes.
    struct Runs {
        int64_t count, length, from_step, to_step;
    };
    Runs runs(const Stretch& stretch, const View& to, int64_t to_step) const {
        const int64_t positions = stretch.end - stretch.first, from = g.step_x * q.source.x, step = to_step * to.x;
        if (from == g.batch && step == g.batch) return {1, positions * g.batch, 0, 0};
        return {positions, g.batch, from, step};
    }

    void write_sums(const Plane& p, int64_t channel, int64_t y, const Stretch& stretch, const std::vector<Tap>& taps) {
        const View& d = q.dest;
        const Runs r = runs(stretch, d, g.dest_step_x);
        float* to = d.data + channel * d.c + (p.dest_y + y * g.dest_step_y) * d.y +
                    (p.dest_x + stretch.first * g.dest_step_x) * d.x;
        const float bias = q.bias ? q.bias[channel] : 0.0f;
        static constexpr decltype(&write_vectors<1>) write[] = {nullptr,          write_vectors<1>, write_vectors<2>,
                                                                write_vectors<3>, write_vectors<4>, write_vectors<5>,
                                                                write_vectors<6>, write_vectors<7>, write_vectors<8>};
        for (int64_t i = 0; i < r.count; ++i, to += r.to_step) {
            const bool around = bypass && reinterpret_cast<uintptr_t>(to) % sizeof(vec) == 0;
            int64_t lane = 0;
            while (lane + kLanes <= r.length) {  // several vectors at a time, whose sums do not wait for each other
                const int64_t vectors = std::min<int64_t>((r.length - lane) / kLanes, 8);
                write[vectors](taps, i * r.from_step + lane, bias, to + lane, around);
                lane += vectors * kLanes;
            }
            for (; lane < r.length; ++lane) {
                float total = bias;
                for (const Tap& tap : taps) total += tap.weight * tap.from[i * r.from_step + lane];
                to[lane] = total;
            }
        }
    }

    template <int V>
    static void write_vectors(const std::vector<Tap>& taps, int64_t at, float bias, float* to, bool around) {
        vec total[V];
        for (int v = 0; v < V; ++v) total[v] = splat(bias);
        for (const Tap& tap : taps) {
            const vec weight = splat(tap.weight);
            for (int v = 0; v < V; ++v) total[v] += weight * load(tap.from + at + v * kLanes);
        }
        for (int v = 0; v < V; ++v)
            if (around)
                store_around(to + v * kLanes, total[v]);
            else
                store(to + v * kLanes, total[v]);
    }

    void add_products(int64_t channel, int64_t y, const Stretch& stretch, const std::vector<Tap>& taps,
                      float* sums) const {
        const View& d = q.grad;
        const Runs r = runs(stretch, d, 1);
        const float* grad = d.data + channel * d.c + y * d.y + stretch.first * d.x;
        for (size_t first = 0; first < taps.size(); first += kMaxTogether) {
            const int count = int(std::min<size_t>(kMaxTogether, taps.size() - first));
            add_some(taps.data() + first, count, grad, r, sums, std::make_integer_sequence<int, kMaxTogether>());
        }
    }

    template <int... I>
    static void add_some(const Tap* taps, int count, const float* grad, const Runs& r, float* sums,
                         std::integer_sequence<int, I...>) {
        using Kernel = void (*)(const Tap*, const float*, const Runs&, float*);
        static constexpr Kernel kernels[] = {add_taps<I + 1>...};
        kernels[count - 1](taps, grad, r, sums);
    }

    template <int T>
    static void add_taps(const Tap* taps, const float* grad, const Runs& r, float* sums) {
        vec total[T];
        const float* from[T];
        for (int t = 0; t < T; ++t) {
            total[t] = load(sums + taps[t].index * kLanes);
            from[t] = taps[t].from;
        }
        for (int64_t i = 0; i < r.count; ++i) {
            const float* line = grad + i * r.to_step;
            const int64_t at = i * r.from_step;
            int64_t lane = 0;
            for (; lane + kLanes <= r.length; lane += kLanes) {
                const vec v = load(line + lane);
                for (int t = 0; t < T; ++t) total[t] += v * load(from[t] + at + lane);
            }
            if (lane < r.length) {
                const int rest = int(r.length - lane);
                const vec v = load_some(line + lane, rest);
                for (int t = 0; t < T; ++t) total[t] += v * load_some(from[t] + at + lane, rest);
            }
        }
        for (int t = 0; t < T; ++t) store(sums + taps[t].index * kLanes, total[t]);
    }
};

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
