// Batch normalisation in batch-last layout, where a channel is one contiguous block, with what follows it:
//     v = (x - mean) * rstd * weight + bias + residual;  y = activation(v)
//     g = grad * activation'(v);  d residual = g
//     dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat))   in training
// A channel's second pass finds it in cache, so each direction reads memory about once. Backward computes v anew
// from x (with a residual: takes the activation's slope from y, or v from x and the residual).
#include <omp.h>

#include "bypass.h"
#include "kernels.h"
#include "norm_channel.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

// Whether a result is too large to wait in a cache, and lies so that it can go around them; null is no result.
template <class T>
bool bypasses(const Norm& q, const T* to) {
    return q.channels * q.size * int64_t(sizeof(T)) > kBypassBytes && aligned_for_vectors(to);
}

template <class T, class Act, bool kResidual>
void apply(const Norm& q, int64_t c) {
    const Channel<T> channel(q, c);
    T* y = channel_of<T>(q.y, q, c);
    write_channel(q.size, bypasses(q, y), [&](int64_t i, int count, auto put) {
        put(y + i, Act::value(channel.template before_activation<kResidual>(i, count)), count);
    });
}

template <class T, class Act, Slope kSlope>
void channel_backward(const Norm& q, int64_t c) {
    ChannelGradient<T, Act, kSlope> gradient(q, c, channel_of<T>(q.grad, q, c));
    T* to = channel_of<T>(q.grad_x, q, c);
    T* to_residual = channel_of<T>(q.grad_residual, q, c);  // gets g
    // Where g is dear to compute twice, it is kept in between: in its own place, or in dx's.
    constexpr bool kKeeps = Act::kCostly;
    T* kept = to_residual ? to_residual : to;
    gradient.add(0, q.size, kKeeps ? kept : nullptr);
    gradient.finish();
    T* residual = kKeeps ? nullptr : to_residual;  // still to be written
    const auto of = gradient.of_element();
    if (to == nullptr) {
        if (residual)
            each_vector(q.size, [=](int64_t i, int count) { store(residual + i, of.before(i, count), count); });
        return;
    }
    const auto second_pass = [&](auto slope) {
        write_channel(q.size, bypasses(q, to) && bypasses(q, residual), [=](int64_t i, int count, auto put) {
            const vec centred = load(of.x + i, count) - of.mean;
            const vec g = kKeeps ? load(kept + i, count) : of.before(i, count, centred);
            if (residual) put(residual + i, g, count);
            put(to + i, slope(g, centred), count);
        });
    };
    if (q.training)
        second_pass([of](vec g, vec centred) { return of.slope_in_training(g, centred); });
    else
        second_pass([of](vec g, vec) { return of.slope_as_given(g); });
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
                if (q.measure) channel_statistics(q, c, channel_of<T>(q.x, q, c));
                q.rstd[c] = reciprocal_deviation(q.variance[c], q.eps);
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
