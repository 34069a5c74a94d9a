// Pooling in batch-last layout: lanes are samples. Forward takes the maximum or the weighted sum over each window;
// backward gathers, for each input position, from the windows that cover it, so that it is written once and in order.
#include <limits>
#include <omp.h>
#include <vector>

#include "api.h"
#include "simd.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

typedef uint8_t bytes __attribute__((vector_size(kLanes), may_alias));

inline ivec load_bytes(const uint8_t* p, int count) {
    bytes b = {};
    std::memcpy(&b, p, size_t(count));
    return __builtin_convertvector(b, ivec);
}

inline void store_bytes(uint8_t* p, ivec v, int count) {
    const bytes b = __builtin_convertvector(v, bytes);
    std::memcpy(p, &b, size_t(count));
}

// Which windows cover each input position, and with which of their taps.
struct Covering {
    std::vector<int32_t> start, window, tap;
    explicit Covering(const Windows& w) : start(size_t(w.size) + 1) {
        for (int pass = 0; pass < 2; ++pass) {
            std::vector<int32_t> next = start;
            for (int64_t o = 0; o < w.count; ++o)
                for (int32_t t = w.low[o]; t < w.high[o]; ++t) {
                    const size_t at = size_t(w.first[o] + t * w.step);
                    if (pass == 0) {
                        ++start[at + 1];
                    } else {
                        window[size_t(next[at])] = int32_t(o);
                        tap[size_t(next[at]++)] = t;
                    }
                }
            if (pass == 0) {
                for (size_t i = 0; i < size_t(w.size); ++i) start[i + 1] += start[i];
                window.resize(size_t(start.back()));
                tap.resize(size_t(start.back()));
            }
        }
    }
};

}  // namespace

void pool_forward(const Pool& q) {
    const int64_t n = q.batch, row = q.x.size * n;
    const int32_t taps_x = q.x.taps;
#pragma omp parallel for schedule(static) num_threads(q.threads)
    for (int64_t line = 0; line < q.channels * q.y.count; ++line) {
        const int64_t oy = line % q.y.count;
        const float* channel = q.input + line / q.y.count * q.y.size * row;
        for (int64_t ox = 0; ox < q.x.count; ++ox) {
            const int64_t out = (line * q.x.count + ox) * n;
            const int32_t low_y = q.y.low[oy], high_y = q.y.high[oy], low_x = q.x.low[ox], high_x = q.x.high[ox];
            const auto each_tap = [&](auto use) {
                for (int32_t ty = low_y; ty < high_y; ++ty)
                    for (int32_t tx = low_x; tx < high_x; ++tx)
                        use(channel + (q.y.first[oy] + ty * q.y.step) * row + (q.x.first[ox] + tx * q.x.step) * n,
                            ty * taps_x + tx);
            };
            if (q.chosen)
                each_vector(n, [&](int64_t i, int count) {
                    vec best = splat(-std::numeric_limits<float>::infinity());
                    ivec at = ivec{} + (low_y * taps_x + low_x);
                    each_tap([&](const float* p, int32_t tap) {
                        const vec v = load(p + i, count);
                        const ivec taken = (v > best) | (v != v);  // NaN is the largest, as in torch
                        best = taken ? v : best;
                        at = taken ? ivec{} + tap : at;
                    });
                    store(q.output + out + i, best, count);
                    store_bytes(q.chosen + out + i, at, count);
                });
            else
                each_vector(n, [&](int64_t i, int count) {
                    vec total = {};
                    each_tap([&](const float* p, int32_t) { total += load(p + i, count); });
                    store(q.output + out + i, total * (q.y.scale[oy] * q.x.scale[ox]), count);
                });
        }
    }
}

void pool_backward(const Pool& q) {
    const int64_t n = q.batch;
    const Covering rows(q.y), columns(q.x);
#pragma omp parallel for schedule(static) num_threads(q.threads)
    for (int64_t line = 0; line < q.channels * q.y.size; ++line) {
        const int64_t y = line % q.y.size, channel = line / q.y.size * q.y.count;
        for (int64_t x = 0; x < q.x.size; ++x)
            each_vector(n, [&](int64_t i, int count) {
                vec total = {};
                for (int32_t a = rows.start[size_t(y)]; a < rows.start[size_t(y) + 1]; ++a)
                    for (int32_t b = columns.start[size_t(x)]; b < columns.start[size_t(x) + 1]; ++b) {
                        const int64_t oy = rows.window[size_t(a)], ox = columns.window[size_t(b)];
                        const int64_t out = ((channel + oy) * q.x.count + ox) * n + i;
                        const vec g = load(q.grad + out, count);
                        if (q.chosen) {
                            const int32_t tap = rows.tap[size_t(a)] * q.x.taps + columns.tap[size_t(b)];
                            total += load_bytes(q.chosen + out, count) == ivec{} + tap ? g : vec{};
                        } else {
                            total += g * (q.y.scale[oy] * q.x.scale[ox]);
                        }
                    }
                store(q.grad_input + (line * q.x.size + x) * n + i, total, count);
            });
    }
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
