// One channel of a batch norm, forward and backward: what norm.cpp does for whole activations and norm_depthwise.cpp
// on the way. Both so have the same results, to the last bit.
#pragma once
#include <type_traits>

#include "activation.h"
#include "bypass.h"
#include "each_vector.h"
#include "element.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {

// Elements that are fetched ahead, where a pass reads a channel from memory: the processor alone begins anew at each
// page.
constexpr int64_t kAhead = 2048;
constexpr int64_t kChunk = 2048;  // elements summed in single precision before they join a double

// Adds to sums in double, over elements [begin, end), the two vectors that terms(i, count, &a, &b) adds to. `begin` is
// a multiple of kChunk.
template <class Terms>
SPARSE_FT_INLINE void two_sums(int64_t begin, int64_t end_of_all, Terms terms, double* total_a, double* total_b) {
    for (int64_t start = begin; start < end_of_all; start += kChunk) {
        const int64_t end = start + kChunk < end_of_all ? start + kChunk : end_of_all;
        vec sum_a[4] = {}, sum_b[4] = {};
        int64_t i = start;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes)
            for (int k = 0; k < 4; ++k) terms(i + k * kLanes, kLanes, sum_a[k], sum_b[k]);
        for (; i + kLanes <= end; i += kLanes) terms(i, kLanes, sum_a[0], sum_b[0]);
        if (i < end) terms(i, int(end - i), sum_a[1], sum_b[1]);
        *total_a += sum((sum_a[0] + sum_a[1]) + (sum_a[2] + sum_a[3]));
        *total_b += sum((sum_b[0] + sum_b[1]) + (sum_b[2] + sum_b[3]));
    }
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

// Calls each(i, count, put) for all of a channel, where put(to, v, count) stores. From its end to its beginning, piece
// by piece: the pass before has just left the end in the caches.
template <class Each>
void write_channel(int64_t size, bool around, Each each) {
    constexpr int64_t kPiece = 4096;
    const auto write = [&](auto put) {
        for (int64_t begin = size > 0 ? (size - 1) / kPiece * kPiece : -1; begin >= 0; begin -= kPiece)
            each_vector(std::min(kPiece, size - begin), [&](int64_t i, int count) { each(begin + i, count, put); });
    };
    if (around)
        write([](auto* to, vec v, int n) { n == kLanes ? store_around(to, v) : store(to, v, n); });
    else
        write([](auto* to, vec v, int n) { store(to, v, n); });
}

// Writes the mean and the variance of channel c, whose elements are at x.
template <class T>
void channel_statistics(const Norm& q, int64_t c, const T* x) {
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
    double a = 0, b = 0;
    two_sums(0, beginning, moments(vec{}), &a, &b);
    const float shift = float(a / double(beginning));
    a = b = 0;
    two_sums(0, q.size, moments(splat(shift)), &a, &b);
    const double mean = a / double(q.size), variance = b / double(q.size) - mean * mean;
    q.mean[c] = float(mean + shift);
    q.variance[c] = variance_of(variance);
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

enum class Slope { kFromX, kFromResidual, kFromOutput };  // what tells the activation's slope beside x

// What the gradient of one element takes: plain numbers, which a loop that has a copy of them keeps in registers,
// whatever it writes.
template <class T, class Act, Slope kSlope>
struct ElementGradient {
    const T *x, *residual, *grad, *output;
    vec mean, scale, offset;
    vec through_mean, through_x;  // of the sums

    vec before(int64_t i, int count) const { return before(i, count, load(x + i, count) - mean); }
    // g, the gradient before the activation; centred: x less its mean.
    vec before(int64_t i, int count, vec centred) const {
        const vec g = load(grad + i, count);
        if constexpr (std::is_same_v<Act, Identity>) return g;
        vec v = kSlope == Slope::kFromOutput ? load(output + i, count) : centred * scale + offset;
        if constexpr (kSlope == Slope::kFromResidual) v = v + load(residual + i, count);
        return keep_lanes(Act::grad(g, v), count);
    }
    // dx of g where the statistics are x's own. Every caller's must round alike: left to the compiler, some products
    // are fused with what follows and some are not.
    vec slope_in_training(vec g, vec centred) const {
        return multiply_add(g, scale, -multiply_add(centred, through_x, through_mean));
    }
    // Where they are given, x takes no part, whatever it is.
    vec slope_as_given(vec g) const { return g * scale; }
};

// The way back through one channel: add() over all of it, finish(), then the gradients of x.
template <class T, class Act, Slope kSlope>
class ChannelGradient {
  public:
    // `of_result`: the gradient of the norm's result, of this channel.
    ChannelGradient(const Norm& norm, int64_t c, const T* of_result) : q(norm), number(c) {
        const Channel<T> channel(norm, c);
        element = {channel.x,    channel.residual, of_result,      channel_of<T>(norm.output, norm, c),
                   channel.mean, channel.scale_v,  channel.offset, vec{},
                   vec{}};
        scale = channel.scale;
    }
    // Of every element, once finished; before that only before() counts.
    const ElementGradient<T, Act, kSlope>& of_element() const { return element; }

    // Elements [begin, end); `kept` gets g where it is not null.
    SPARSE_FT_INLINE void add(int64_t begin, int64_t end, T* kept) {
        if (kept)
            sum(begin, end, [kept](int64_t i, int count, vec g) { store(kept + i, g, count); });
        else
            sum(begin, end, [](int64_t, int, vec) {});
    }
    void finish() {
        const float rstd = q.rstd[number];
        if (q.grad_weight) q.grad_weight[number] = float(sum_gx * rstd);
        if (q.grad_bias) q.grad_bias[number] = float(sum_g);
        element.through_mean = splat(float(scale * sum_g / double(q.size)));
        element.through_x = splat(float(double(scale) * rstd * rstd * sum_gx / double(q.size)));
    }

  private:
    const Norm& q;
    const int64_t number;
    ElementGradient<T, Act, kSlope> element;
    float scale;
    double sum_g = 0, sum_gx = 0;

    template <class Keep>
    SPARSE_FT_INLINE void sum(int64_t begin, int64_t end, Keep keep) {
        two_sums(
            begin, end,
            [from = element, keep](int64_t i, int count, vec& a, vec& b) {
                prefetch(from.x + i + kAhead);
                prefetch(from.grad + i + kAhead);
                const vec centred = load(from.x + i, count) - from.mean;
                const vec g = from.before(i, count, centred);
                keep(i, count, g);
                a += g;
                b += g * keep_lanes(centred, count);
            },
            &sum_g, &sum_gx);
    }
};

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
