// Depthwise convolutions in batch-last layout, row by row: a channel is one contiguous block, and a row of positions
// reads a few rows of its own channel, which stay in the first-level cache. No packing.
#pragma once
#include <algorithm>
#include <atomic>

#include "bypass.h"
#include "panel.h"
#include "result.h"
#include "window.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

// sums = bias + the taps' products, for V vectors.
template <class T, int V>
void write_vectors(const Tap* taps, size_t count, const T* from, float bias, T* to, bool around) {
    vec total[V];
    for (int v = 0; v < V; ++v) total[v] = splat(bias);
    for (size_t i = 0; i < count; ++i) {
        const vec weight = splat(taps[i].weight);
        for (int v = 0; v < V; ++v) total[v] += weight * load(from + taps[i].offset + v * kLanes);
    }
    for (int v = 0; v < V; ++v)
        if (around)
            store_around(to + v * kLanes, total[v]);
        else
            store(to + v * kLanes, total[v]);
}

// Either product of a depthwise convolution. Where a channel's source, gradient and destination begin is the caller's
// to say: rows of them need not be in memory before and after.
template <class T>
class DepthwiseRows {
    struct Entry {                   // a nonzero of the channel
        int64_t source_y, source_x;  // at position 0
        int64_t column;              // of the kernel
        float weight;
        int32_t index;
    };
    struct Taps {                // of a stretch
        std::vector<Tap> all;    // that reach it
        std::vector<int64_t> y;  // of their source, at position 0
        int64_t low, high;       // rows [low, high) of the source, at which all of them are within it
        int64_t width;           // of the rectangle that they are; 0 if they are none
        size_t first, end;       // those within it at a row
        const WindowKernels<T>* window = nullptr;  // if these are a rectangle
        const Tap* begin() const { return all.data() + first; }
        size_t count() const { return end - first; }
    };
    struct Stretch {  // positions of a row that the same taps reach
        int64_t first, end;
        std::vector<char> reached;  // by kernel column
    };

  public:
    // One channel of one plane, while its rows are computed.
    class Channel {
        friend class DepthwiseRows;
        uint64_t rows = 0;  // whose it is: a thread keeps it between calls
        int64_t plane, number;
        std::vector<int32_t> columns;  // of its nonzeros
        std::vector<Entry> entries;
        std::vector<Taps> taps;
        std::vector<float> sums;  // of products, a vector each
        Scratch stage, floats;    // a row of sums; the same as floats
    };

    // `around`: whether sums go to memory around the caches, where they lie so that they can.
    DepthwiseRows(const Product& product, bool around) : q(product), g(product.geometry), bypass(around) {
        for (int64_t i = 0; i < q.plane_count; ++i) stretches.push_back(cut(q.planes[i]));
    }

    // Null, or what is wrong with a channel's nonzeros; to be asked of all before the rest.
    const char* check(int64_t plane, int64_t row) const {
        const Plane& p = q.planes[plane];
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

    void begin(int64_t plane, int64_t number, Channel* channel) const {
        const Plane& p = q.planes[plane];
        const int32_t first = p.row_ptr[number], end = p.row_ptr[number + 1];
        const std::vector<Stretch>& all = stretches[size_t(plane)];
        std::vector<Taps>& taps = channel->taps;
        const bool alike = channel->rows == id && channel->plane == plane &&
                           std::equal(q.col + first, q.col + end, channel->columns.begin(), channel->columns.end());
        channel->rows = id;
        channel->plane = plane;
        channel->number = number;
        channel->sums.assign(q.value_grad ? size_t(end - first) * kLanes : 0, 0.0f);
        if (alike) {  // as most are: the taps lie as the last channel's
            for (size_t i = 0; i < all.size(); ++i)
                for (Tap& tap : taps[i].all) tap.weight = value_of(first + tap.index);
            return;
        }
        channel->columns.assign(q.col + first, q.col + end);
        find_entries(p, first, end, &channel->entries);
        if (taps.size() < all.size()) taps.resize(all.size());
        for (size_t i = 0; i < all.size(); ++i) find_taps(channel->entries, all[i], &taps[i]);
    }

    // Row `y` of positions. The source's row r is at source + r * q.source.y, and so for the gradient; `to` is where
    // the channel's destination begins.
    void sums(int64_t y, const T* source, T* to, Channel* channel) const {
        const Plane& p = q.planes[channel->plane];
        T* row = to + (p.dest_y + y * g.dest_step_y) * q.dest.y + p.dest_x * q.dest.x;
        const int64_t dest_step = g.dest_step_x * q.dest.x;
        // Where something follows the sums, a row of them waits for it in the first-level cache.
        const bool staged = q.result != nullptr;
        T* const stage = staged ? channel->stage.template of<T>(size_t(p.width * g.batch)) : nullptr;
        T* const sums = staged ? stage : row;
        const int64_t step = staged ? g.batch : dest_step;
        each_stretch(y, source, channel, [&](const Stretch& stretch, const Taps& taps, const T* from) {
            write_sums(channel->number, stretch, taps, from, sums + stretch.first * step, step, bypass && !staged);
        });
        if (staged) finish_row(stage, row, dest_step, p.width, channel);
    }
    void products(int64_t y, const T* source, const T* grad, Channel* channel) const {
        each_stretch(y, source, channel, [&](const Stretch& stretch, const Taps& taps, const T* from) {
            add_products(y, stretch, taps, from, grad, channel->sums.data());
        });
    }
    // After all rows of products.
    void write_products(const Channel& channel) const {
        const int32_t* row_ptr = q.planes[channel.plane].row_ptr + channel.number;
        for (int32_t j = row_ptr[0]; j < row_ptr[1]; ++j)
            q.value_grad[j] = sum(load(channel.sums.data() + (j - row_ptr[0]) * kLanes));
    }

  private:
    static constexpr int kMaxTogether = 12;  // taps whose sums stay in registers

    const Product& q;
    const Geometry& g;
    const bool bypass;
    static inline std::atomic<uint64_t> made{0};
    const uint64_t id = ++made;
    std::vector<std::vector<Stretch>> stretches;  // of each plane

    float value_of(int32_t j) const { return q.values ? q.values[q.perm ? q.perm[j] : j] : 0.0f; }

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

    template <class Body>
    void each_stretch(int64_t y, const T* source, Channel* channel, const Body& body) const {
        const std::vector<Stretch>& all = stretches[size_t(channel->plane)];
        const int64_t row = y * g.step_y;
        for (size_t i = 0; i < all.size(); ++i) {
            clip(row, &channel->taps[i]);
            body(all[i], channel->taps[i], source + row * q.source.y + all[i].first * g.step_x * q.source.x);
        }
    }

    void find_entries(const Plane& p, int32_t begin, int32_t end, std::vector<Entry>* entries) const {
        entries->clear();
        for (int32_t j = begin; j < end; ++j) {
            const int64_t row = q.col[j] / g.taps_w, column = q.col[j] % g.taps_w;
            entries->push_back({p.tap_y[row], p.tap_x[column], column, value_of(j), j - begin});
        }
        // In the order of the source, which is that of a window's taps; an input gradient's entries come backwards.
        std::sort(entries->begin(), entries->end(), [](const Entry& a, const Entry& b) {
            return a.source_y != b.source_y ? a.source_y < b.source_y : a.source_x < b.source_x;
        });
    }

    void find_taps(const std::vector<Entry>& entries, const Stretch& stretch, Taps* taps) const {
        taps->all.clear();
        taps->y.clear();
        bool gap = false;
        int64_t x = 0;  // of the source of the first
        taps->width = 0;
        for (const Entry& entry : entries) {
            if (!stretch.reached[size_t(entry.column)]) continue;
            const int64_t number = int64_t(taps->all.size());
            if (number == 0) x = entry.source_x;
            if (number == 0 || (entry.source_y == taps->y[0] && taps->width == number)) ++taps->width;
            gap |= number > 0 &&
                   (entry.source_y != taps->y[0] + number / taps->width || entry.source_x != x + number % taps->width);
            taps->all.push_back(
                {entry.source_y * q.source.y + entry.source_x * q.source.x, entry.weight, entry.index});
            taps->y.push_back(entry.source_y);
        }
        const bool none = taps->all.empty();
        if (none || gap || int64_t(taps->all.size()) % taps->width != 0 || g.batch % kLanes != 0) taps->width = 0;
        taps->low = none ? 0 : -taps->y.front();
        taps->high = none ? g.source_h : g.source_h - taps->y.back();
        taps->end = taps->all.size() + 1;  // no row's yet
    }

    // The taps of a row of positions; most rows have those of the row before. Whole rows of a rectangle are one, too.
    void clip(int64_t row, Taps* taps) const {
        size_t first = 0, end = taps->all.size();
        if (taps->first == 0 && taps->end == end && row >= taps->low && row < taps->high) return;
        while (first < end && row + taps->y[first] < 0) ++first;
        while (first < end && row + taps->y[end - 1] >= g.source_h) --end;
        taps->first = first;
        taps->end = end;
        taps->window = taps->width > 0 && first < end
                           ? find_window<T>(int64_t(end - first) / taps->width, taps->width, g.step_x)
                           : nullptr;
    }
    WindowRow<T> window_row(const Stretch& stretch, const T* from, T* to, const T* grad, int64_t step) const {
        return {from, q.source.y, q.source.x, to, grad, step, stretch.end - stretch.first, g.batch};
    }

    // Positions that follow one another without a gap on both sides are one run of lanes.
    struct Runs {
        int64_t count, length, from_step, to_step;
    };
    Runs runs(const Stretch& stretch, int64_t step) const {
        const int64_t positions = stretch.end - stretch.first, from = g.step_x * q.source.x;
        if (from == g.batch && step == g.batch) return {1, positions * g.batch, 0, 0};
        return {positions, g.batch, from, step};
    }

    static float* as_floats(float* run, int64_t, Channel*) { return run; }
    static float* as_floats(const Bf16* run, int64_t length, Channel* channel) {
        float* floats = channel->floats.floats(size_t(length));
        read_run(run, floats, length);
        return floats;
    }
    // What follows a product's sums, and their way to the destination. `sums`: of a row of positions, as they would be
    // stored; `step`: from one position's to the next one's at `to`.
    void finish_row(T* sums, T* to, int64_t step, int64_t positions, Channel* channel) const {
        const int64_t pieces = step == g.batch ? 1 : positions, length = positions * g.batch / pieces;
        with_result<T>(q, [&](const auto& result) {
            for (int64_t i = 0; i < pieces; ++i, to += step, sums += length) {
                float* results = as_floats(sums, length, channel);
                result.finish(channel->number, results, to - static_cast<T*>(q.dest.data), length);
                write_run(to, results, length, bypass);
            }
        });
    }

    // `step`: from one position's sums to the next one's.
    void write_sums(int64_t channel, const Stretch& stretch, const Taps& taps, const T* from, T* to, int64_t step,
                    bool bypass) const {
        const float bias = q.bias ? q.bias[channel] : 0.0f;
        if (taps.window) {
            // Parts of lines that do not follow one another are better not stored around the caches.
            const bool around = bypass && aligned_for_vectors(to) && step % kLanes == 0 &&
                                (step == g.batch || g.batch * sizeof(T) % 64 == 0);
            return taps.window->sums(window_row(stretch, from + taps.begin()->offset, to, nullptr, step), taps.begin(),
                                     bias, around);
        }
        const Runs r = runs(stretch, step);
        using Kernel = decltype(&write_vectors<T, 1>);
        static constexpr Kernel write[] = {nullptr,
                                           write_vectors<T, 1>,
                                           write_vectors<T, 2>,
                                           write_vectors<T, 3>,
                                           write_vectors<T, 4>,
                                           write_vectors<T, 5>,
                                           write_vectors<T, 6>,
                                           write_vectors<T, 7>,
                                           write_vectors<T, 8>};
        for (int64_t i = 0; i < r.count; ++i, to += r.to_step) {
            const bool around = bypass && aligned_for_vectors(to) && (r.count == 1 || r.length * sizeof(T) % 64 == 0);
            int64_t lane = 0;
            while (lane + kLanes <= r.length) {  // several vectors at a time, whose sums do not wait for each other
                const int64_t vectors = std::min<int64_t>((r.length - lane) / kLanes, 8);
                write[vectors](taps.begin(), taps.count(), from + i * r.from_step + lane, bias, to + lane, around);
                lane += vectors * kLanes;
            }
            for (; lane < r.length; ++lane) {
                float total = bias;
                for (const Tap* tap = taps.begin(); tap < taps.begin() + taps.count(); ++tap)
                    total += tap->weight * widen(from[tap->offset + i * r.from_step + lane]);
                store_one(to + lane, total);
            }
        }
    }

    void add_products(int64_t y, const Stretch& stretch, const Taps& taps, const T* from, const T* grad_of_channel,
                      float* sums) const {
        const View& d = q.grad;
        const T* grad = grad_of_channel + y * d.y + stretch.first * d.x;
        if (taps.window) {
            return taps.window->products(window_row(stretch, from + taps.begin()->offset, nullptr, grad, d.x),
                                         taps.begin(), sums);
        }
        const Runs r = runs(stretch, d.x);
        for (size_t first = 0; first < taps.count(); first += kMaxTogether) {
            const int count = int(std::min<size_t>(kMaxTogether, taps.count() - first));
            add_some(taps.begin() + first, count, from, grad, r, sums,
                     std::make_integer_sequence<int, kMaxTogether>());
        }
    }

    template <int... I>
    static void add_some(const Tap* taps, int count, const T* source, const T* grad, const Runs& r, float* sums,
                         std::integer_sequence<int, I...>) {
        using Kernel = void (*)(const Tap*, const T*, const T*, const Runs&, float*);
        static constexpr Kernel kernels[] = {add_taps<I + 1>...};
        kernels[count - 1](taps, source, grad, r, sums);
    }

    template <int N>
    static void add_taps(const Tap* taps, const T* source, const T* grad, const Runs& r, float* sums) {
        vec total[N];
        const T* from[N];
        for (int t = 0; t < N; ++t) {
            total[t] = load(sums + taps[t].index * kLanes);
            from[t] = source + taps[t].offset;
        }
        for (int64_t i = 0; i < r.count; ++i) {
            const T* line = grad + i * r.to_step;
            const int64_t at = i * r.from_step;
            int64_t lane = 0;
            for (; lane + kLanes <= r.length; lane += kLanes) {
                const vec v = load(line + lane);
                for (int t = 0; t < N; ++t) total[t] += v * load(from[t] + at + lane);
            }
            if (lane < r.length) {
                const int rest = int(r.length - lane);
                const vec v = load_some(line + lane, rest);
                for (int t = 0; t < N; ++t) total[t] += v * load_some(from[t] + at + lane, rest);
            }
        }
        for (int t = 0; t < N; ++t) store(sums + taps[t].index * kLanes, total[t]);
    }
};

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
