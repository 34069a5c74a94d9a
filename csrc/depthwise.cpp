// Both products of depthwise convolutions in batch-last layout. They run at the speed of memory.
#include <atomic>
#include <omp.h>

#include "depthwise_rows.h"
#include "kernels.h"

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
          rows(product, bypass),
          whole(!q.value_grad && q.plane_count == 1 && g.batch % kLanes != 0 && g.dest_step_y == 1 &&
                g.dest_step_x == 1 && find_frame(q.planes[0])) {}

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
                if (const char* text = rows.check(i / g.groups, i % g.groups)) problem = text;
            if (problem.load() == nullptr) {
#pragma omp for schedule(dynamic, 1)
                for (int64_t channel = 0; channel < g.groups; ++channel) {
                    if (whole)
                        compute_whole(channel);
                    else
                        for (int64_t i = 0; i < q.plane_count; ++i) compute(i, channel);
                }
                if (bypass) finish_stores_around();
            }
        }
        return problem;
    }

  private:
    const Product& q;
    const Geometry& g;
    const bool bypass;
    const DepthwiseRows<T> rows;
    struct Frame {  // a channel with its border, cut into the phases of the stride: every tap is a shift
        int64_t first_y, first_x;   // source position of its beginning
        int64_t height, width;      // of a phase, in positions
        std::vector<int64_t> taps;  // where each begins, in floats
    } frame;
    const bool whole;  // whether channels are computed in frames

    void compute(int64_t plane, int64_t number) const {
        thread_local typename DepthwiseRows<T>::Channel channel;
        rows.begin(plane, number, &channel);
        const T* source = static_cast<const T*>(q.source.data) + number * q.source.c;
        if (q.value_grad) {
            const T* grad = static_cast<const T*>(q.grad.data) + number * q.grad.c;
            for (int64_t y = 0; y < q.planes[plane].height; ++y) rows.products(y, source, grad, &channel);
            rows.write_products(channel);
        } else {
            T* to = static_cast<T*>(q.dest.data) + number * q.dest.c;
            for (int64_t y = 0; y < q.planes[plane].height; ++y) rows.sums(y, source, to, &channel);
        }
    }

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
        const int32_t begin = p.row_ptr[channel], end = p.row_ptr[channel + 1];
        for (int32_t i = 0; i < end - begin; ++i) {
            // In the order of the source, as rows have them; an input gradient's entries come backwards.
            const int32_t j =
                p.tap_y[0] > p.tap_y[g.taps_h - 1] || p.tap_x[0] > p.tap_x[g.taps_w - 1] ? end - 1 - i : begin + i;
            taps.push_back({frame.taps[size_t(q.col[j])], q.values[q.perm ? q.perm[j] : j], 0});
        }
        const int64_t floats = frame_floats();
        float* framed = frame_scratch.floats(size_t(floats + kTogether * kLanes));
        fill_frame(static_cast<const T*>(q.source.data) + channel * q.source.c, framed, floats);

        const View& d = q.dest;
        const float bias = q.bias ? q.bias[channel] : 0.0f;
        const int64_t rows = std::clamp<int64_t>(kStageFloats / pitch, 1, p.height);
        float* stage = stage_scratch.floats(size_t(rows * pitch + kTogether * kLanes));
        const int64_t pieces = d.x == n ? 1 : p.width, length = p.width * n / pieces;
        with_result<T>(q, [&](auto result) {
            for (int64_t y = 0; y < p.height; y += rows) {
                const int64_t end = std::min(y + rows, p.height), run = (end - y - 1) * pitch + p.width * n;
                for (int64_t i = 0; i < run; i += kTogether * kLanes)
                    write_vectors<float, kTogether>(taps, framed + y * pitch + i, bias, stage + i, false);
                for (int64_t r = y; r < end; ++r)
                    for (int64_t i = 0; i < pieces; ++i) {
                        const int64_t at = channel * d.c + (p.dest_y + r) * d.y + (p.dest_x + i) * d.x;
                        float* results = stage + (r - y) * pitch + i * length;
                        result.finish(channel, results, at, length);
                        write_run(static_cast<T*>(d.data) + at, results, length, bypass);
                    }
            }
        });
    }

    void fill_frame(const T* from, float* framed, int64_t floats) const {
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
                const T* row = from + (frame.first_x + phase) * q.source.x + (frame.first_y + phase_y) * q.source.y;
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
