// Pooling in batch-last layout: lanes are samples. Forward takes the maximum or the weighted sum over each window;
// backward fills the input's gradient row by row, each from the windows that reach it, while it is in cache.
#include <algorithm>
#include <limits>
#include <omp.h>
#include <vector>

#include "bypass.h"
#include "each_vector.h"
#include "element.h"
#include "kernels.h"
#include "panel.h"

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

// Which windows reach each input row, and with which of their taps.
struct Reach {
    std::vector<int32_t> start, window, tap;
    explicit Reach(const Windows& w) : start(size_t(w.size) + 1) {
        for (int64_t o = 0; o < w.count; ++o)
            for (int32_t t = w.low[o]; t < w.high[o]; ++t) ++start[size_t(w.first[o] + t * w.step) + 1];
        for (size_t i = 0; i < size_t(w.size); ++i) start[i + 1] += start[i];
        window.resize(size_t(start.back()));
        tap.resize(size_t(start.back()));
        std::vector<int32_t> next = start;
        for (int64_t o = 0; o < w.count; ++o)
            for (int32_t t = w.low[o]; t < w.high[o]; ++t) {
                const size_t at = size_t(next[size_t(w.first[o] + t * w.step)]++);
                window[at] = int32_t(o);
                tap[at] = t;
            }
    }
};

template <class T, bool kMax>
void forward(const Pool& q) {
    const int64_t n = q.batch, row = q.x.size * n;
#pragma omp parallel for schedule(static) num_threads(q.threads)
    for (int64_t line = 0; line < q.channels * q.y.count; ++line) {
        const Windows y = q.y, x = q.x;
        const int64_t oy = line % y.count;
        const T* from = static_cast<const T*>(q.input) + line / y.count * y.size * row + y.first[oy] * row;
        const int32_t low_y = y.low[oy], high_y = y.high[oy];
        for (int64_t ox = 0; ox < x.count; ++ox) {
            const int32_t low_x = x.low[ox], high_x = x.high[ox];
            const T* corner = from + x.first[ox] * n;
            T* output = static_cast<T*>(q.output) + (line * x.count + ox) * n;
            uint8_t* chosen = q.chosen + (line * x.count + ox) * n;
            const float weight = kMax ? 1.0f : y.scale[oy] * x.scale[ox];
            each_vector(n, [&](int64_t i, int count) {
                vec best = kMax ? splat(-std::numeric_limits<float>::infinity()) : vec{};
                ivec at = ivec{} + (low_y * x.taps + low_x);
                for (int32_t ty = low_y; ty < high_y; ++ty)
                    for (int32_t tx = low_x; tx < high_x; ++tx) {
                        const vec v = load(corner + ty * y.step * row + tx * x.step * n + i, count);
                        if (kMax) {
                            const ivec taken = (v > best) | (v != v);  // NaN is the largest, as in torch
                            best = taken ? v : best;
                            at = taken ? ivec{} + (ty * x.taps + tx) : at;
                        } else {
                            best += v;
                        }
                    }
                store(output + i, kMax ? best : best * weight, count);
                if (kMax) store_bytes(chosen + i, at, count);
            });
        }
    }
}

template <class T, bool kMax>
void backward(const Pool& q) {
    const int64_t n = q.batch;
    const Reach rows(q.y);
    const bool bypass = q.channels * q.y.size * q.x.size * n * int64_t(sizeof(T)) > kBypassBytes;
#pragma omp parallel num_threads(q.threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t line = 0; line < q.channels * q.y.size; ++line) {
            const Windows x = q.x;
            const size_t y = size_t(line % q.y.size);
            const int64_t channel = line / q.y.size * q.y.count;
            thread_local Scratch scratch;  // windows that overlap are added up in float, and in cache
            float* row = scratch.floats(size_t(x.size * n));
            std::fill(row, row + x.size * n, 0.0f);
            for (size_t a = size_t(rows.start[y]); a < size_t(rows.start[y + 1]); ++a) {
                const int64_t oy = rows.window[a], from = (channel + oy) * x.count * n;
                const int32_t taps = rows.tap[a] * x.taps;
                for (int64_t ox = 0; ox < x.count; ++ox) {
                    const T* grad = static_cast<const T*>(q.grad) + from + ox * n;
                    const uint8_t* chosen = q.chosen + from + ox * n;
                    float* corner = row + x.first[ox] * n;
                    const int32_t low = x.low[ox], high = x.high[ox];
                    const int64_t step = x.step * n;
                    const float weight = kMax ? 1.0f : q.y.scale[oy] * x.scale[ox];
                    each_vector(n, [=](int64_t i, int count) {
                        const vec g = kMax ? load(grad + i, count) : load(grad + i, count) * weight;
                        const ivec own = kMax ? load_bytes(chosen + i, count) - taps : ivec{};
                        for (int32_t tx = low; tx < high; ++tx) {
                            float* to = corner + tx * step + i;
                            store(to, load(to, count) + (kMax ? (own == ivec{} + tx ? g : vec{}) : g), count);
                        }
                    });
                }
            }
            write_run(static_cast<T*>(q.grad_input) + line * x.size * n, row, x.size * n, bypass);
        }
        if (bypass) finish_stores_around();
    }
}

}  // namespace

void pool_forward(const Pool& q) {
    with_element(q.element, [&](auto element) {
        q.chosen ? forward<decltype(element), true>(q) : forward<decltype(element), false>(q);
    });
}

void pool_backward(const Pool& q) {
    with_element(q.element, [&](auto element) {
        q.chosen ? backward<decltype(element), true>(q) : backward<decltype(element), false>(q);
    });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
