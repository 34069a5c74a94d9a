// Depthwise convolutions of samples too few to fill vectors: a channel is copied into a frame with its border, cut
// into the phases of the stride. Every tap is a shift there, and the channel one run of lanes, of which what is
// computed for positions between the end of a row and the beginning of the next is left out.
#pragma once
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "depthwise_rows.h"
#include "panel.h"
#include "result.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

template <class T>
class DepthwiseFrames {
  public:
    DepthwiseFrames(const Product& product, bool bypass_)
        : fit(!product.value_grad && product.plane_count == 1 && product.geometry.batch % kLanes != 0 &&
              product.geometry.dest_step_y == 1 && product.geometry.dest_step_x == 1),
          q(product),
          g(product.geometry),
          p(product.planes[0]),
          bypass(bypass_) {
        fit = fit && find_frame();
        if (!fit) return;
        const int64_t each = (g.groups + product.threads - 1) / product.threads;  // all threads have some
        together = std::clamp<int64_t>(kStageFloats / frame_floats(), 1, std::min<int64_t>(each, 8));
        pitch = width * g.batch;
        rows = together > 1 ? p.height : std::clamp<int64_t>(kStageFloats / pitch, 1, p.height);
    }

    bool fit;              // whether channels are computed in frames
    int64_t together = 1;  // so many at a time: a load that spans what was just stored in pieces has to wait for these

    struct Room {  // a thread's
        Scratch frames, stage;
        std::vector<Tap> taps;
    };

    // Before the first channel: borders stay what they are from channel to channel.
    void enter(Room* room) const {
        const size_t floats = size_t(together * frame_floats() + kVectors * kLanes);
        std::memset(room->frames.floats(floats), 0, floats * sizeof(float));
    }

    // `count` channels, at most `together`, from `channel` on.
    void compute(int64_t channel, int64_t count, Room* room) const {
        const int64_t floats = frame_floats(), staged = rows * pitch + kVectors * kLanes;
        float* frames = room->frames.floats(size_t(together * floats + kVectors * kLanes));
        float* stage = room->stage.floats(size_t(together * staged));
        for (int64_t i = 0; i < count; ++i)
            fill(static_cast<const T*>(q.source.data) + (channel + i) * q.source.c, frames + i * floats);
        for (int64_t y = 0; y < p.height; y += rows) {
            const int64_t part = std::min(rows, p.height - y), run = (part - 1) * pitch + p.width * g.batch;
            for (int64_t i = 0; i < count; ++i) {
                find_taps(channel + i, &room->taps);
                const float bias = q.bias ? q.bias[channel + i] : 0.0f;
                for (int64_t at = 0; at < run; at += kVectors * kLanes)
                    write_vectors<float, kVectors>(room->taps.data(), room->taps.size(),
                                                   frames + i * floats + y * pitch + at, bias, stage + i * staged + at,
                                                   false);
            }
            for (int64_t i = 0; i < count; ++i) write_rows(channel + i, y, part, stage + i * staged);
        }
    }

  private:
    const Product& q;
    const Geometry& g;
    const Plane& p;
    const bool bypass;
    int64_t first_y = 0, first_x = 0;  // source position of a frame's beginning
    int64_t height = 0, width = 0;     // of a phase, in positions
    std::vector<int64_t> tap_places;   // where each begins, in floats
    int64_t pitch = 0, rows = 0;       // floats of a row of positions; rows that are staged at a time

    static constexpr int64_t kMostFrameFloats = 1 << 20;
    static constexpr int kVectors = 4;             // computed at a time
    static constexpr int64_t kStageFloats = 4096;  // of results that wait in the first-level cache

    // False where there is nothing to compute, or the taps lie so far apart that a frame would be mostly border.
    bool find_frame() {
        if (p.height < 1 || p.width < 1) return false;
        const auto reach = [](const int32_t* taps, int64_t count, int64_t step, int64_t* first) {
            const auto [low, high] = std::minmax_element(taps, taps + count);
            *first = *low;
            return (int64_t(*high) - *low) / step;
        };
        height = p.height + reach(p.tap_y, g.taps_h, g.step_y, &first_y);
        width = p.width + reach(p.tap_x, g.taps_w, g.step_x, &first_x);
        if (std::min(first_y, first_x) <= kNoTap || height > 2 * p.height + 8 || width > 2 * p.width + 8 ||
            frame_floats() > kMostFrameFloats)
            return false;
        for (int64_t k = 0; k < g.taps_h * g.taps_w; ++k)
            tap_places.push_back(place(p.tap_y[k / g.taps_w] - first_y, p.tap_x[k % g.taps_w] - first_x));
        return true;
    }
    int64_t frame_floats() const { return g.step_y * g.step_x * height * width * g.batch; }

    // Where a source position `y`, `x` from the frame's beginning lies in it, in floats.
    int64_t place(int64_t y, int64_t x) const {
        return (y % g.step_y * g.step_x + x % g.step_x) * height * width * g.batch +
               (y / g.step_y * width + x / g.step_x) * g.batch;
    }

    void find_taps(int64_t channel, std::vector<Tap>* taps) const {
        taps->clear();
        const int32_t begin = p.row_ptr[channel], end = p.row_ptr[channel + 1];
        // In the order of the source, as rows have them; an input gradient's entries come backwards.
        const bool backwards = p.tap_y[0] > p.tap_y[g.taps_h - 1] || p.tap_x[0] > p.tap_x[g.taps_w - 1];
        for (int32_t i = 0; i < end - begin; ++i) {
            const int32_t j = backwards ? end - 1 - i : begin + i;
            taps->push_back({tap_places[size_t(q.col[j])], q.values[q.perm ? q.perm[j] : j], 0});
        }
    }

    void fill(const T* from, float* frame) const {
        const int64_t n = g.batch;
        const auto inside = [](int64_t first, int64_t size, int64_t source) {  // of the frame's positions
            return std::pair(std::clamp<int64_t>(-first, 0, size), std::clamp<int64_t>(source - first, 0, size));
        };
        const auto [top, bottom] = inside(first_y, g.step_y * height, g.source_h);
        const auto [left, right] = inside(first_x, g.step_x * width, g.source_w);
        for (int64_t phase = left; phase < std::min(left + g.step_x, right); ++phase) {
            const int64_t count = (right - phase + g.step_x - 1) / g.step_x, step = g.step_x * q.source.x;
            for (int64_t phase_y = top; phase_y < std::min(top + g.step_y, bottom); ++phase_y) {
                float* to = frame + place(phase_y, phase);
                const T* row = from + (first_x + phase) * q.source.x + (first_y + phase_y) * q.source.y;
                for (int64_t y = phase_y; y < bottom; y += g.step_y) {
                    if (step == n)
                        AsTheyAre().run(row, to, count * n);
                    else if (n == 1)
                        gather(row, step, to, count);
                    else
                        for (int64_t i = 0; i < count; ++i) AsTheyAre().run(row + i * step, to + i * n, n);
                    row += g.step_y * q.source.y;
                    to += width * n;
                }
            }
        }
    }

    // Rows [y, y + count) of a channel's positions.
    void write_rows(int64_t channel, int64_t y, int64_t count, float* staged) const {
        const View& d = q.dest;
        const int64_t pieces = d.x == g.batch ? 1 : p.width, length = p.width * g.batch / pieces;
        with_result<T>(q, [&](auto result) {
            for (int64_t r = 0; r < count; ++r)
                for (int64_t i = 0; i < pieces; ++i) {
                    const int64_t at = channel * d.c + (p.dest_y + y + r) * d.y + (p.dest_x + i) * d.x;
                    float* results = staged + r * pitch + i * length;
                    result.finish(channel, results, at, length);
                    write_run(static_cast<T*>(d.data) + at, results, length, bypass);
                }
        });
    }
};

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
