// Batch normalisation in batch-last layout, where a channel is one contiguous block, with what follows it:
//     v = (x - mean) * rstd * weight + bias + residual;  y = activation(v)
//     g = grad * activation'(v);  d residual = g
//     dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat))   in training
// A channel's second pass finds it in cache, so each direction reads memory about once. Backward computes v anew
// from x (with a residual: takes the activation's slope from y, or v from x and the residual).
#include <cmath>
#include <omp.h>
#include <type_traits>

#include "activation.h"
#include "bypass.h"
#include "each_vector.h"
#include "element.h"
#include "kernels.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

constexpr int64_t kChunk = 2048;  // elements summed in single precision before they join a double

// Sums over a channel, in double, of the two vectors that terms(i, count, &a, &b) adds to.
template <class Terms>
void two_sums(int64_t size, Terms terms, double* a, double* b) {
    double total_a = 0, total_b = 0;
    for (int64_t start = 0; start < size; start += kChunk) {
        const int64_t end = start + kChunk < size ? start + kChunk : size;
        vec sum_a[4] = {}, sum_b[4] = {};
        int64_t i = start;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes)
            for (int k = 0; k < 4; ++k) terms(i + k * kLanes, kLanes, sum_a[k], sum_b[k]);
        for (; i + kLanes <= end; i += kLanes) terms(i, kLanes, sum_a[0], sum_b[0]);
        if (i < end) terms(i, int(end - i), sum_a[1], sum_b[1]);
        total_a += sum((sum_a[0] + sum_a[1]) + (sum_a[2] + sum_a[3]));
        total_b += sum((sum_b[0] + sum_b[1]) + (sum_b[2] + sum_b[3]));
    }
    *a = total_a;
    *b = total_b;
}

// Where channel c begins; null where there is no such activation.
template <class T>
const T* channel_of(const void* activation, const Norm& q, int64_t c) {
    return activation ? static_cast<const T*>(activation) + c * q.size : nullptr;
}
template <class T>
T* channel_of(void* activation, const Norm& q, int64_t c) {
    return activation ? static_cast<T*>(activation) + c * q.size : nullptr;
}

template <class T>
void channel_statistics(const Norm& q, int64_t c) {
    const T* x = channel_of<T>(q.x, q, c);
    // Sums of x - shift and its square: a shift near the mean keeps their difference exact.
    const auto moments = [x](vec shift) {
        return [x, shift](int64_t i, int count, vec& a, vec& b) {
            const vec d = keep_lanes(load(x + i, count) - shift, count);
            a += d;
            b += d * d;
        };
    };
    // Near the mean is the mean of a beginning. One element would not do: it may be an outlier.
    const int64_t beginning = q.size < kChunk ? q.size : kChunk;
    double a, b;
    two_sums(beginning, moments(vec{}), &a, &b);
    const float shift = float(a / double(beginning));
    two_sums(q.size, moments(splat(shift)), &a, &b);
    const double mean = a / double(q.size), variance = b / double(q.size) - mean * mean;
    q.mean[c] = float(mean + shift);
    q.variance[c] = float(variance > 0 ? variance : (variance <= 0 ? 0.0 : variance));  // NaN stays NaN
}

template <class T>
struct Channel {  // one channel's way from x to v
    const T *x, *residual;
    float scale;
    vec mean, scale_v, offset;
    Channel(const Norm& q, int64_t c)
        : x(channel_of<T>(q.x, q, c)),
          residual(channel_of<T>(q.residual, q, c)),
          scale(q.rstd[c] * (q.weight ? q.weight[c] : 1.0f)),
          mean(splat(q.mean[c])),
          scale_v(splat(scale)),
          offset(splat(q.bias ? q.bias[c] : 0.0f)) {}

    template <bool kResidual>
    vec before_activation(int64_t i, int count) const {
        const vec v = (load(x + i, count) - mean) * scale_v + offset;
        return kResidual ? v + load(residual + i, count) : v;
    }
};

// Whether a result is too large to wait in a cache, and lies so that it can go around them; null is no result.
template <class T>
bool bypasses(const Norm& q, const T* to) {
    return q.channels * q.size * int64_t(sizeof(T)) > kBypassBytes && aligned_for_vectors(to);
}

// Calls each(i, count, put) for all of a channel, where put(to, v, count) stores.
template <class Each>
void write_channel(int64_t size, bool around, Each each) {
    if (around)
        each_vector(size, [&](int64_t i, int count) {
            each(i, count, [](auto* to, vec v, int n) { n == kLanes ? store_around(to, v) : store(to, v, n); });
        });
    else
        each_vector(size,
                    [&](int64_t i, int count) { each(i, count, [](auto* to, vec v, int n) { store(to, v, n); }); });
}

template <class T, class Act, bool kResidual>
void apply(const Norm& q, int64_t c) {
    const Channel<T> channel(q, c);
    T* y = channel_of<T>(q.y, q, c);
    write_channel(q.size, bypasses(q, y), [&](int64_t i, int count, auto put) {
        put(y + i, Act::value(channel.template before_activation<kResidual>(i, count)), count);
    });
}

enum class Slope { kFromX, kFromResidual, kFromOutput };  // what tells the activation's slope beside x

template <class T, class Act, Slope kSlope>
void channel_backward(const Norm& q, int64_t c) {
    const Channel<T> channel(q, c);
    const T *x = channel.x, *grad = channel_of<T>(q.grad, q, c), *output = channel_of<T>(q.output, q, c);
    const auto before = [&](int64_t i, int count) {  // g, the gradient before the activation
        const vec g = load(grad + i, count);
        if constexpr (std::is_same_v<Act, Identity>) return g;
        const vec v = kSlope == Slope::kFromOutput
                          ? load(output + i, count)
                          : channel.template before_activation<kSlope == Slope::kFromResidual>(i, count);
        return keep_lanes(Act::grad(g, v), count);
    };
    T* to = channel_of<T>(q.grad_x, q, c);
    T* to_residual = channel_of<T>(q.grad_residual, q, c);  // gets g
    // Where g is dear to compute twice, it is kept in between: in its own place, or in dx's.
    constexpr bool kKeeps = Act::kCostly;
    T* kept = to_residual ? to_residual : to;

    double sum_g, sum_gx;
    two_sums(
        q.size,
        [&](int64_t i, int count, vec& a, vec& b) {
            const vec g = before(i, count);
            if (kKeeps && kept) store(kept + i, g, count);
            a += g;
            b += g * keep_lanes(load(x + i, count) - channel.mean, count);
        },
        &sum_g, &sum_gx);
    const float rstd = q.rstd[c], scale = channel.scale;
    if (q.grad_weight) q.grad_weight[c] = float(sum_gx * rstd);
    if (q.grad_bias) q.grad_bias[c] = float(sum_g);
    T* residual = kKeeps ? nullptr : to_residual;  // still to be written
    if (to == nullptr) {
        if (residual) each_vector(q.size, [&](int64_t i, int count) { store(residual + i, before(i, count), count); });
        return;
    }

    // dx = scale * g - through_x * (x - mean) - through_mean
    const vec scale_v = channel.scale_v, mean = channel.mean;
    const vec through_mean = splat(float(scale * sum_g / double(q.size)));
    const vec through_x = splat(float(double(scale) * rstd * rstd * sum_gx / double(q.size)));
    const auto second_pass = [&](auto slope) {
        write_channel(q.size, bypasses(q, to) && bypasses(q, residual), [&](int64_t i, int count, auto put) {
            const vec g = kKeeps ? load(kept + i, count) : before(i, count);
            if (residual) put(residual + i, g, count);
            put(to + i, slope(i, count, g), count);
        });
    };
    if (q.training)
        second_pass([&](int64_t i, int count, vec g) {
            return g * scale_v - (load(x + i, count) - mean) * through_x - through_mean;
        });
    else  // x takes no part, whatever it is
        second_pass([&](int64_t, int, vec g) { return g * scale_v; });
}

template <class T, class Act>
void backward(const Norm& q, int64_t c) {
    if constexpr (Act::kFromOutput)
        if (q.output) return channel_backward<T, Act, Slope::kFromOutput>(q, c);
    if (q.residual) return channel_backward<T, Act, Slope::kFromResidual>(q, c);
    channel_backward<T, Act, Slope::kFromX>(q, c);
}

// Calls body with the type of the elements and that of the activation.
template <class Body>
void with_types(const Norm& q, Body body) {
    with_element(q.element,
                 [&](auto element) { with_activation(q.activation, [&](auto act) { body(element, act); }); });
}

}  // namespace

void norm_forward(const Norm& q) {
    with_types(q, [&](auto element, auto act) {
        using T = decltype(element);
        using Act = decltype(act);
#pragma omp parallel num_threads(q.threads)
        {
#pragma omp for schedule(static) nowait
            for (int64_t c = 0; c < q.channels; ++c) {
                if (q.measure) channel_statistics<T>(q, c);
                q.rstd[c] = float(1.0 / std::sqrt(double(q.variance[c]) + q.eps));
                if (q.y == nullptr) continue;
                if (q.residual)
                    apply<T, Act, true>(q, c);
                else
                    apply<T, Act, false>(q, c);
            }
            finish_stores_around();
        }
    });
}

void norm_backward(const Norm& q) {
    with_types(q, [&](auto element, auto act) {
#pragma omp parallel num_threads(q.threads)
        {
#pragma omp for schedule(static) nowait
            for (int64_t c = 0; c < q.channels; ++c) backward<decltype(element), decltype(act)>(q, c);
            finish_stores_around();
        }
    });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
