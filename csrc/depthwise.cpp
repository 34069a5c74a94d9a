// Both products of depthwise convolutions in batch-last layout, where a channel is one contiguous block: no packing.
// A row of positions reads a few rows of its own channel, which stay in the first-level cache, so that the
// products run at the speed of memory.
#include <atomic>
#include <omp.h>

#include "bypass.h"
#include "kernels.h"
#include "panel.h"
#include "result.h"
#include "window.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

namespace {

template <class T>
class Depthwise {
  public:
    explicit Depthwise(const Product& product)
        : q(product),
          g(product.geometry),
          bypass(!q.value_grad && result_bytes(q) > kBypassBytes),
          whole(std::is_same_v<T, float> && !q.value_grad && q.plane_count == 1 && g.batch % kLanes != 0 &&
                g.dest_step_y == 1 && g.dest_step_x == 1 && find_frame(q.planes[0])) {
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
                for (int64_t channel = 0; channel < g.groups; ++channel) {
                    if constexpr (std::is_same_v<T, float>)
                        if (whole) {
                            compute_whole(channel);
                            continue;
                        }
                    for (int64_t i = 0; i < q.plane_count; ++i) compute(i, channel);
                }
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
        int64_t offset;  // from the position's own place in the source
        float weight;
        int32_t index;
    };
    struct Taps {                    // of a stretch
        std::vector<Entry> entries;  // that reach it
        size_t first, end;           // those of them within the source at a row, which are
        std::vector<Tap> list;
        const WindowKernels<T>* window = nullptr;  // if they are a rectangle without a gap
        float weights[kWindowTaps];                // of a window
    };
    struct Stretch {  // positions of a row that the same taps reach
        int64_t first, end;
        std::vector<char> reached;  // by kernel column
    };

    const Product& q;
    const Geometry& g;
    const bool bypass;
    struct Frame {  // a channel with its border, cut into the phases of the stride: every tap is a shift
        int64_t first_y, first_x;   // source position of its beginning
        int64_t height, width;      // of a phase, in positions
        std::vector<int64_t> taps;  // where each begins, in floats
    } frame;
    const bool whole;                             // whether channels are computed in frames
    std::vector<std::vector<Stretch>> stretches;  // of each plane

    static constexpr int64_t kMostFrameFloats = 1 << 20;
    static constexpr int kTogether = 4;            // vectors computed at a time
    static constexpr int64_t kStageFloats = 4096;  // of results that wait in the first-level cache

    // False where there is nothing to compute, or the taps lie so far apart that a frame would be mostly border.
    bool find_frame(const Plane& p) {
        if (p.height < 1 || p.width < 1) return false;
        const auto reach = [](const int32_t* taps, int64_t count, int64_t step, int64_t* first) {
            const auto [low, high] = std::minmax_element(taps, taps + count);
            *first = *low;
            return (int64_t(*high) - *low) / step;
        };
        frame.height = p.height + reach(p.tap_y, g.taps_h, g.step_y, &frame.first_y);
        frame.width = p.width + reach(p.tap_x, g.taps_w, g.step_x, &frame.first_x);
        if (std::min(frame.first_y, frame.first_x) <= kNoTap || frame.height > 2 * p.height + 8 ||
            frame.width > 2 * p.width + 8 || frame_floats() > kMostFrameFloats)
            return false;
        for (int64_t k = 0; k < g.taps_h * g.taps_w; ++k)
            frame.taps.push_back(place(p.tap_y[k / g.taps_w] - frame.first_y, p.tap_x[k % g.taps_w] - frame.first_x));
        return true;
    }
    int64_t frame_floats() const { return g.step_y * g.step_x * frame.height * frame.width * g.batch; }

    // Where a source position `y`, `x` from the frame's beginning lies in it, in floats.
    int64_t place(int64_t y, int64_t x) const {
        return (y % g.step_y * g.step_x + x % g.step_x) * frame.height * frame.width * g.batch +
               (y / g.step_y * frame.width + x / g.step_x) * g.batch;
    }

    // A channel of samples too few to fill vectors: framed, it is one run of lanes. What is computed for positions
    // between the end of a row and the beginning of the next is left out.
    void compute_whole(int64_t channel) {
        const Plane& p = q.planes[0];
        const int64_t n = g.batch, pitch = frame.width * n;
        thread_local std::vector<Tap> taps;
        thread_local Scratch frame_scratch, stage_scratch;
        taps.clear();
        for (int32_t j = p.row_ptr[channel]; j < p.row_ptr[channel + 1]; ++j)
            taps.push_back({frame.taps[size_t(q.col[j])], q.values[q.perm ? q.perm[j] : j], 0});
        const int64_t floats = frame_floats();
        float* framed = frame_scratch.floats(size_t(floats + kTogether * kLanes));
        fill_frame(static_cast<const float*>(q.source.data) + channel * q.source.c, framed, floats);

        const View& d = q.dest;
        const float bias = q.bias ? q.bias[channel] : 0.0f;
        const int64_t rows = std::clamp<int64_t>(kStageFloats / pitch, 1, p.height);
        float* stage = stage_scratch.floats(size_t(rows * pitch + kTogether * kLanes));
        const int64_t pieces = d.x == n ? 1 : p.width, length = p.width * n / pieces;
        with_result(q, [&](auto result) {
            for (int64_t y = 0; y < p.height; y += rows) {
                const int64_t end = std::min(y + rows, p.height), run = (end - y - 1) * pitch + p.width * n;
                for (int64_t i = 0; i < run; i += kTogether * kLanes)
                    write_vectors<kTogether>(taps, framed + y * pitch + i, bias, stage + i, false);
                for (int64_t r = y; r < end; ++r)
                    for (int64_t i = 0; i < pieces; ++i) {
                        const int64_t at = channel * d.c + (p.dest_y + r) * d.y + (p.dest_x + i) * d.x;
                        float* results = stage + (r - y) * pitch + i * length;
                        result.finish(channel, results, at, length);
                        write_run(static_cast<float*>(d.data) + at, results, length, bypass);
                    }
            }
        });
    }

    void fill_frame(const float* from, float* framed, int64_t floats) const {
        const int64_t n = g.batch;
        std::memset(framed, 0, size_t(floats) * sizeof(float));
        const auto inside = [](int64_t first, int64_t size, int64_t source) {  // of the frame's positions
            return std::pair(std::clamp<int64_t>(-first, 0, size), std::clamp<int64_t>(source - first, 0, size));
        };
        const auto [top, bottom] = inside(frame.first_y, g.step_y * frame.height, g.source_h);
        const auto [left, right] = inside(frame.first_x, g.step_x * frame.width, g.source_w);
        for (int64_t phase = left; phase < std::min(left + g.step_x, right); ++phase) {
            const int64_t count = (right - phase + g.step_x - 1) / g.step_x, step = g.step_x * q.source.x;
            for (int64_t phase_y = top; phase_y < std::min(top + g.step_y, bottom); ++phase_y) {
                float* to = framed + place(phase_y, phase);
                const float* row =
                    from + (frame.first_x + phase) * q.source.x + (frame.first_y + phase_y) * q.source.y;
                for (int64_t y = phase_y; y < bottom; y += g.step_y) {
                    if (step == n)
                        AsTheyAre().run(row, to, count * n);
                    else if (n == 1)
                        gather(row, step, to, count);
                    else
                        for (int64_t i = 0; i < count; ++i) AsTheyAre().run(row + i * step, to + i * n, n);
                    row += g.step_y * q.source.y;
                    to += frame.width * n;
                }
            }
        }
    }

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
                const T* from = static_cast<const T*>(q.source.data) + channel * q.source.c + row * q.source.y +
                                all[i].first * g.step_x * q.source.x;
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

    const WindowKernels<T>* window_of(const std::vector<Entry>& entries, size_t first, size_t end) const {
        if (first == end) return nullptr;
        const int64_t y = entries[first].source_y, x = entries[first].source_x;
        int64_t height = 0, width = 0;
        while (first + size_t(width) < end && entries[first + size_t(width)].source_y == y) ++width;
        for (size_t i = first; i < end; ++height)
            for (int64_t column = 0; column < width; ++column, ++i)
                if (i == end || entries[i].source_y != y + height || entries[i].source_x != x + column) return nullptr;
        return find_window<T>(height, width, g.step_x);
    }
    WindowRow<T> window_row(const Stretch& stretch, const T* from, T* to, const T* grad, int64_t step) const {
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
                    const T* from) {
        const View& d = q.dest;
        const Runs r = runs(stretch, d, g.dest_step_x);
        T* to = static_cast<T*>(d.data) + channel * d.c + (p.dest_y + y * g.dest_step_y) * d.y +
                (p.dest_x + stretch.first * g.dest_step_x) * d.x;
        const int64_t step = g.dest_step_x * d.x;
        if constexpr (std::is_same_v<T, float>)
            if (q.result != nullptr) return write_finished(channel, stretch, taps, from, to, r, step);
        write_sums(channel, stretch, taps, from, to, r, step, bypass);
    }

    // With what follows a product's sums; a row of them waits in the first-level cache.
    void write_finished(int64_t channel, const Stretch& stretch, const Taps& taps, const float* from, float* to,
                        Runs staged, int64_t step) {
        const int64_t positions = stretch.end - stretch.first;
        thread_local Scratch scratch;
        float* stage = scratch.floats(size_t(positions * g.batch));
        staged.to_step = g.batch;
        write_sums(channel, stretch, taps, from, stage, staged, g.batch, false);
        const int64_t pieces = step == g.batch ? 1 : positions, length = positions * g.batch / pieces;
        with_result(q, [&](auto result) {
            for (int64_t i = 0; i < pieces; ++i, to += step, stage += length) {
                result.finish(channel, stage, to - static_cast<float*>(q.dest.data), length);
                write_run(to, stage, length, bypass);
            }
        });
    }

    void write_sums(int64_t channel, const Stretch& stretch, const Taps& taps, const T* from, T* to, const Runs& r,
                    int64_t step, bool bypass) {
        const float bias = q.bias ? q.bias[channel] : 0.0f;
        if (taps.window) {
            // Parts of lines that do not follow one another are better not stored around the caches.
            const bool around = bypass && aligned_for_vectors(to) && step % kLanes == 0 &&
                                (step == g.batch || g.batch * sizeof(T) % 64 == 0);
            return taps.window->sums(window_row(stretch, from + taps.list[0].offset, to, nullptr, step), taps.weights,
                                     bias, around);
        }
        static constexpr decltype(&write_vectors<1>) write[] = {nullptr,          write_vectors<1>, write_vectors<2>,
                                                                write_vectors<3>, write_vectors<4>, write_vectors<5>,
                                                                write_vectors<6>, write_vectors<7>, write_vectors<8>};
        for (int64_t i = 0; i < r.count; ++i, to += r.to_step) {
            const bool around = bypass && aligned_for_vectors(to) && (r.count == 1 || r.length * sizeof(T) % 64 == 0);
            int64_t lane = 0;
            while (lane + kLanes <= r.length) {  // several vectors at a time, whose sums do not wait for each other
                const int64_t vectors = std::min<int64_t>((r.length - lane) / kLanes, 8);
                write[vectors](taps.list, from + i * r.from_step + lane, bias, to + lane, around);
                lane += vectors * kLanes;
            }
            for (; lane < r.length; ++lane) {
                float total = bias;
                for (const Tap& tap : taps.list)
                    total += tap.weight * widen(from[tap.offset + i * r.from_step + lane]);
                store_one(to + lane, total);
            }
        }
    }

    template <int V>
    static void write_vectors(const std::vector<Tap>& taps, const T* from, float bias, T* to, bool around) {
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

    void add_products(int64_t channel, int64_t y, const Stretch& stretch, const Taps& taps, const T* from,
                      float* sums) const {
        const View& d = q.grad;
        const Runs r = runs(stretch, d, 1);
        const T* grad = static_cast<const T*>(d.data) + channel * d.c + y * d.y + stretch.first * d.x;
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

}  // namespace

bool is_depthwise(const Product& q) {
    const Geometry& g = q.geometry;
    return g.rows_per_group == 1 && g.channels_per_group == 1 && g.groups > 1 && q.source.n == 1 && !q.norm &&
           (q.value_grad ? q.grad.n : q.dest.n) == 1;
}

const char* run_depthwise(const Product& product) {
    return with_element(product.element, [&](auto element) { return Depthwise<decltype(element)>(product).run(); });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
