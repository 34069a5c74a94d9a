// Batch normalisation in batch-last layout, where a channel is one contiguous block:
//     y = (x - mean) * rstd * weight + bias
//     dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat))   in training
// A channel's second pass finds it in cache, so each direction reads memory about once.
#include <cmath>
#include <omp.h>

#include "api.h"
#include "simd.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

constexpr int64_t kChunk = 2048;  // floats summed in single precision before they join a double

// Calls term(i, value vectors...) is inlined per use; here: sums of (a, b) over a channel in double.
template <class Terms>
void two_sums(int64_t size, Terms terms, double* a, double* b) {
    double total_a = 0, total_b = 0;
    for (int64_t start = 0; start < size; start += kChunk) {
        const int64_t end = start + kChunk < size ? start + kChunk : size;
        vec sum_a[4] = {}, sum_b[4] = {};
        int64_t i = start;
        for (; i + 4 * kLanes <= end; i += 4 * kLanes)
            for (int k = 0; k < 4; ++k) terms(i + k * kLanes, sum_a[k], sum_b[k]);
        for (; i + kLanes <= end; i += kLanes) terms(i, sum_a[0], sum_b[0]);
        if (i < end) terms(i, sum_a[1], sum_b[1], int(end - i));
        total_a += sum((sum_a[0] + sum_a[1]) + (sum_a[2] + sum_a[3]));
        total_b += sum((sum_b[0] + sum_b[1]) + (sum_b[2] + sum_b[3]));
    }
    *a = total_a;
    *b = total_b;
}

inline vec load_some(const float* p, int count) {
    vec v = {};
    std::memcpy(&v, p, size_t(count) * sizeof(float));
    return v;
}

struct Moments {  // sums of x - shift and (x - shift)^2; a shift near the mean keeps their difference exact
    const float* x;
    vec shift;
    void operator()(int64_t i, vec& a, vec& b) const {
        const vec d = load(x + i) - shift;
        a += d;
        b += d * d;
    }
    void operator()(int64_t i, vec& a, vec& b, int count) const {
        const vec d = keep_lanes(load_some(x + i, count) - shift, lane_mask(count));
        a += d;
        b += d * d;
    }
};

struct GradMoments {  // sums of g and g * (x - mean)
    const float *x, *grad;
    vec mean;
    void operator()(int64_t i, vec& a, vec& b) const {
        const vec g = load(grad + i);
        a += g;
        b += g * (load(x + i) - mean);
    }
    void operator()(int64_t i, vec& a, vec& b, int count) const {
        const vec g = load_some(grad + i, count);
        a += g;
        b += g * keep_lanes(load_some(x + i, count) - mean, lane_mask(count));
    }
};

}  // namespace

void norm_forward(const Norm& q) {
#pragma omp parallel for schedule(static) num_threads(q.threads)
    for (int64_t c = 0; c < q.channels; ++c) {
        const float* x = q.x + c * q.size;
        if (q.training) {
            // Near the mean is the mean of a beginning. One element would not do: it may be an outlier.
            const int64_t beginning = q.size < kChunk ? q.size : kChunk;
            double a, b;
            two_sums(beginning, Moments{x, splat(0.0f)}, &a, &b);
            const float shift = float(a / double(beginning));
            two_sums(q.size, Moments{x, splat(shift)}, &a, &b);
            const double mean = a / double(q.size), variance = b / double(q.size) - mean * mean;
            const double kept = variance > 0 ? variance : (variance <= 0 ? 0.0 : variance);  // NaN stays NaN
            q.mean[c] = float(mean + shift);
            q.rstd[c] = float(1.0 / std::sqrt(kept + q.eps));
            if (q.variance) q.variance[c] = float(kept);
        }
        const float scale = q.rstd[c] * (q.weight ? q.weight[c] : 1.0f);
        const float offset = (q.bias ? q.bias[c] : 0.0f);
        const vec scale_v = splat(scale), offset_v = splat(offset), mean_v = splat(q.mean[c]);
        float* y = q.y + c * q.size;
        int64_t i = 0;
        for (; i + kLanes <= q.size; i += kLanes) store(y + i, (load(x + i) - mean_v) * scale_v + offset_v);
        for (; i < q.size; ++i) y[i] = (x[i] - q.mean[c]) * scale + offset;
    }
}

void norm_backward(const Norm& q) {
#pragma omp parallel for schedule(static) num_threads(q.threads)
    for (int64_t c = 0; c < q.channels; ++c) {
        const float *x = q.x + c * q.size, *grad = q.grad + c * q.size;
        const float mean = q.mean[c], rstd = q.rstd[c];
        double sum_g = 0, sum_gx = 0;
        if (q.training || q.grad_weight || q.grad_bias)
            two_sums(q.size, GradMoments{x, grad, splat(mean)}, &sum_g, &sum_gx);
        if (q.grad_weight) q.grad_weight[c] = float(sum_gx * rstd);
        if (q.grad_bias) q.grad_bias[c] = float(sum_g);
        if (q.grad_x == nullptr) continue;
        const float scale = rstd * (q.weight ? q.weight[c] : 1.0f);
        const vec scale_v = splat(scale);
        float* to = q.grad_x + c * q.size;
        int64_t i = 0;
        if (!q.training) {  // x takes no part, whatever it is
            for (; i + kLanes <= q.size; i += kLanes) store(to + i, load(grad + i) * scale_v);
            for (; i < q.size; ++i) to[i] = grad[i] * scale;
            continue;
        }
        // dx = scale * g - through_x * (x - mean) - through_mean
        const float through_mean = float(scale * sum_g / double(q.size));
        const float through_x = float(double(scale) * rstd * rstd * sum_gx / double(q.size));
        const vec x_v = splat(through_x), mean_v = splat(mean), m_v = splat(through_mean);
        for (; i + kLanes <= q.size; i += kLanes)
            store(to + i, load(grad + i) * scale_v - (load(x + i) - mean_v) * x_v - m_v);
        for (; i < q.size; ++i) to[i] = grad[i] * scale - (x[i] - mean) * through_x - through_mean;
    }
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
