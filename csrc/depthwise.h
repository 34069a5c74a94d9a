// Both products of depthwise convolutions in batch-last layout, where a channel is one contiguous block: no packing.
// A row of positions reads a few rows of its own channel, which stay in the first-level cache, so that the
// products run at the speed of memory.
#pragma once
#include <atomic>
#include <omp.h>

#include "bypass.h"
#include "panel.h"
#include "window.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

inline bool is_depthwise(const Product& q) {
    const Geometry& g = q.geometry;
    return g.rows_per_group == 1 && g.channels_per_group == 1 && g.groups > 1 && q.source.n == 1 && !q.norm &&
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

    struct Entry {                   // a nonzero of the channel
        int64_t source_y, source_x;  // at position 0
        int64_t column;              // of the kernel
        float weight;
        int32_t index;
    };
    struct Tap {         // an entry at the positions that it reaches
        int64_t offset;  // floats from the position's own place in the source
        float weight;
        int32_t index;
    };
    struct Taps {                    // of a stretch
        std::vector<Entry> entries;  // that reach it
        size_t first, end;           // those of them within the source at a row, which are
        std::vector<Tap> list;
        const WindowKernels* window = nullptr;  // if they are a rectangle without a gap
        float weights[kWindowTaps];             // of a window
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
        thread_local std::vector<Taps> taps;
        thread_local std::vector<float> sums;
        find_entries(p, begin, end, &entries);
        sums.assign(q.value_grad ? size_t(end - begin) * kLanes : 0, 0.0f);
        const std::vector<Stretch>& all = stretches[size_t(plane)];
        if (taps.size() < all.size()) taps.resize(all.size());
        for (size_t i = 0; i < all.size(); ++i) {
            taps[i].entries.clear();
            for (const Entry& entry : entries)
                if (all[i].reached[size_t(entry.column)]) taps[i].entries.push_back(entry);
            taps[i].end = entries.size() + 1;  // no row's yet
        }
        for (int64_t y = 0; y < p.height; ++y) {
            const int64_t row = y * g.step_y;
            for (size_t i = 0; i < all.size(); ++i) {
                clip(row, &taps[i]);
                const float* from =
                    q.source.data + channel * q.source.c + row * q.source.y + all[i].first * g.step_x * q.source.x;
                if (q.value_grad)
                    add_products(channel, y, all[i], taps[i], from, sums.data());
                else
                    write_sums(p, channel, y, all[i], taps[i], from);
            }
        }
        if (q.value_grad)
            for (int32_t j = begin; j < end; ++j) q.value_grad[j] = sum(load(sums.data() + (j - begin) * kLanes));
    }

    void find_entries(const Plane& p, int32_t begin, int32_t end, std::vector<Entry>* entries) const {
        entries->clear();
        for (int32_t j = begin; j < end; ++j) {
            const int64_t row = q.col[j] / g.taps_w, column = q.col[j] % g.taps_w;
            entries->push_back({p.tap_y[row], p.tap_x[column], column,
                                q.values ? q.values[q.perm ? q.perm[j] : j] : 0.0f, j - begin});
        }
        // In the order of the source, which is that of a window's taps; an input gradient's entries come backwards.
        std::sort(entries->begin(), entries->end(), [](const Entry& a, const Entry& b) {
            return a.source_y != b.source_y ? a.source_y < b.source_y : a.source_x < b.source_x;
        });
    }

    // The taps of a row of positions; most rows have those of the row before.
    void clip(int64_t row, Taps* taps) const {
        const std::vector<Entry>& entries = taps->entries;
        size_t first = 0, end = entries.size();
        while (first < end && row + entries[first].source_y < 0) ++first;
        while (first < end && row + entries[end - 1].source_y >= g.source_h) --end;
        if (first == taps->first && end == taps->end) return;
        taps->first = first;
        taps->end = end;
        taps->window = g.batch % kLanes == 0 ? window_of(entries, first, end) : nullptr;
        taps->list.resize(end - first);
        for (size_t i = 0; i < end - first; ++i) {
            const Entry& entry = entries[first + i];
            taps->list[i] = {entry.source_y * q.source.y + entry.source_x * q.source.x, entry.weight, entry.index};
            if (taps->window) taps->weights[i] = entry.weight;
        }
    }

    const WindowKernels* window_of(const std::vector<Entry>& entries, size_t first, size_t end) const {
        if (first == end) return nullptr;
        const int64_t y = entries[first].source_y, x = entries[first].source_x;
        int64_t height = 0, width = 0;
        while (first + size_t(width) < end && entries[first + size_t(width)].source_y == y) ++width;
        for (size_t i = first; i < end; ++height)
            for (int64_t column = 0; column < width; ++column, ++i)
                if (i == end || entries[i].source_y != y + height || entries[i].source_x != x + column) return nullptr;
        return find_window(height, width, g.step_x);
    }
    WindowRow window_row(const Stretch& stretch, const float* from, float* to, const float* grad, int64_t step) const {
        return {from, q.source.y, q.source.x, to, grad, step, stretch.end - stretch.first, g.batch};
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

    void write_sums(const Plane& p, int64_t channel, int64_t y, const Stretch& stretch, const Taps& taps,
                    const float* from) {
        const View& d = q.dest;
        const Runs r = runs(stretch, d, g.dest_step_x);
        float* to = d.data + channel * d.c + (p.dest_y + y * g.dest_step_y) * d.y +
                    (p.dest_x + stretch.first * g.dest_step_x) * d.x;
        const float bias = q.bias ? q.bias[channel] : 0.0f;
        if (taps.window) {
            const int64_t step = g.dest_step_x * d.x;
            const bool around = bypass && (reinterpret_cast<uintptr_t>(to) | uintptr_t(step * 4)) % sizeof(vec) == 0;
            return taps.window->sums(window_row(stretch, from + taps.list[0].offset, to, nullptr, step), taps.weights,
                                     bias, around);
        }
        static constexpr decltype(&write_vectors<1>) write[] = {nullptr,          write_vectors<1>, write_vectors<2>,
                                                                write_vectors<3>, write_vectors<4>, write_vectors<5>,
                                                                write_vectors<6>, write_vectors<7>, write_vectors<8>};
        for (int64_t i = 0; i < r.count; ++i, to += r.to_step) {
            const bool around = bypass && reinterpret_cast<uintptr_t>(to) % sizeof(vec) == 0;
            int64_t lane = 0;
            while (lane + kLanes <= r.length) {  // several vectors at a time, whose sums do not wait for each other
                const int64_t vectors = std::min<int64_t>((r.length - lane) / kLanes, 8);
                write[vectors](taps.list, from + i * r.from_step + lane, bias, to + lane, around);
                lane += vectors * kLanes;
            }
            for (; lane < r.length; ++lane) {
                float total = bias;
                for (const Tap& tap : taps.list) total += tap.weight * from[tap.offset + i * r.from_step + lane];
                to[lane] = total;
            }
        }
    }

    template <int V>
    static void write_vectors(const std::vector<Tap>& taps, const float* from, float bias, float* to, bool around) {
        vec total[V];
        for (int v = 0; v < V; ++v) total[v] = splat(bias);
        for (const Tap& tap : taps) {
            const vec weight = splat(tap.weight);
            for (int v = 0; v < V; ++v) total[v] += weight * load(from + tap.offset + v * kLanes);
        }
        for (int v = 0; v < V; ++v)
            if (around)
                store_around(to + v * kLanes, total[v]);
            else
                store(to + v * kLanes, total[v]);
    }

    void add_products(int64_t channel, int64_t y, const Stretch& stretch, const Taps& taps, const float* from,
                      float* sums) const {
        const View& d = q.grad;
        const Runs r = runs(stretch, d, 1);
        const float* grad = d.data + channel * d.c + y * d.y + stretch.first * d.x;
        if (taps.window) {
            float products[kWindowTaps * kLanes];
            taps.window->products(window_row(stretch, from + taps.list[0].offset, nullptr, grad, d.x), products);
            for (size_t i = 0; i < taps.list.size(); ++i) {
                float* to = sums + taps.list[i].index * kLanes;
                store(to, load(to) + load(products + i * kLanes));
            }
            return;
        }
        for (size_t first = 0; first < taps.list.size(); first += kMaxTogether) {
            const int count = int(std::min<size_t>(kMaxTogether, taps.list.size() - first));
            add_some(taps.list.data() + first, count, from, grad, r, sums,
                     std::make_integer_sequence<int, kMaxTogether>());
        }
    }

    template <int... I>
    static void add_some(const Tap* taps, int count, const float* source, const float* grad, const Runs& r,
                         float* sums, std::integer_sequence<int, I...>) {
        using Kernel = void (*)(const Tap*, const float*, const float*, const Runs&, float*);
        static constexpr Kernel kernels[] = {add_taps<I + 1>...};
        kernels[count - 1](taps, source, grad, r, sums);
    }

    template <int T>
    static void add_taps(const Tap* taps, const float* source, const float* grad, const Runs& r, float* sums) {
        vec total[T];
        const float* from[T];
        for (int t = 0; t < T; ++t) {
            total[t] = load(sums + taps[t].index * kLanes);
            from[t] = source + taps[t].offset;
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
