// A depthwise convolution with the batch norm before it and the one after it, channel by channel: none of the three
// mixes channels, so that what one of them makes of a channel waits in the caches for the next.
//     forward:   rows of activation(norm(x)), the convolution's rows, their statistics
//     backward:  the outer norm's sums; row by row its gradient, the weight's and the input's; the inner norm's
// Forward reads x and writes y; backward reads x, y and a gradient and writes one. Every step is that of the pass by
// itself, and so are the results.
#include <omp.h>

#include "depthwise_rows.h"
#include "kernels.h"
#include "norm_steps.h"
#include "strip.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

// Which rows of the source the positions of each plane read: from `low` to `high` beyond their own.
struct Reach {
    std::vector<int64_t> low, high;
    explicit Reach(const Product& q) {
        for (int64_t i = 0; i < q.plane_count; ++i) {
            int64_t least = INT32_MAX, most = INT32_MIN;
            for (int64_t k = 0; k < q.geometry.taps_h; ++k) {
                const int32_t tap = q.planes[i].tap_y[k];
                if (tap == kNoTap) continue;
                least = std::min<int64_t>(least, tap);
                most = std::max<int64_t>(most, tap);
            }
            low.push_back(least <= most ? least : 0);
            high.push_back(least <= most ? most : 0);
        }
    }
    // Rows that may be needed at a time, if planes go on together.
    int64_t rows() const {
        const int64_t least = *std::min_element(low.begin(), low.end());
        const int64_t most = *std::max_element(high.begin(), high.end());
        return std::max<int64_t>(most, 0) - std::min<int64_t>(least, 0) + 1;
    }
};

// Null after body(channels, threads), or what is wrong with the products' patterns, and nothing is called.
template <class T, class Body>
const char* if_well_formed(std::initializer_list<const Product*> products, Body body) {
    const Product& one = **products.begin();
    const int64_t channels = one.geometry.groups;
    for (const Product* q : products) {
        const char* text =
            check_ends(q->planes[0].row_ptr[0], q->planes[q->plane_count - 1].row_ptr[channels], q->nnz);
        if (text) return text;
        const DepthwiseRows<T> rows(*q, false);
        for (int64_t i = 0; i < q->plane_count * channels; ++i)
            if ((text = rows.check(i / channels, i % channels))) return text;
    }
    body(channels, one.threads);
    return nullptr;
}

template <class T>
const char* forward(const NormDepthwise& block) {
    const Product& q = block.sums;
    const Plane& p = q.planes[0];
    const Reach reach(q);
    const int64_t height = q.geometry.source_h, length = q.geometry.source_w * q.geometry.batch;
    return if_well_formed<T>({&q}, [&](int64_t channels, int threads) {
        const DepthwiseRows<T> convolution(q, false);
#pragma omp parallel num_threads(threads)
        {
            thread_local Scratch scratch;
            thread_local typename DepthwiseRows<T>::Channel channel;
            const std::unique_ptr<NormSteps<T>> inner = steps_of<T>(block.inner);
            Strip<T> strip(scratch, height, length, reach.rows());
#pragma omp for schedule(dynamic, 1)
            for (int64_t c = 0; c < channels; ++c) {
                T* to = static_cast<T*>(q.dest.data) + c * q.dest.c;
                inner->begin(c, nullptr);
                convolution.begin(0, c, &channel);
                strip.begin();
                for (int64_t y = 0; y < p.height; ++y) {
                    const int64_t row = y * q.geometry.step_y;
                    const int64_t low = std::clamp<int64_t>(row + reach.low[0], 0, height);
                    const int64_t high = std::clamp<int64_t>(row + reach.high[0] + 1, low, height);
                    const T* source =
                        strip.rows(low, high, [&](int64_t r, T* made) { inner->values(r * length, length, made); });
                    convolution.sums(y, source, to, &channel);
                }
                channel_statistics(block.outer, c, to);
            }
        }
    });
}

template <class T>
const char* backward(const NormDepthwise& block) {
    const Product& input = block.sums;
    Product weight = block.products;
    weight.grad = input.source;  // rows of the same strip
    const Reach of_weight(weight), of_input(input);
    const Plane& p = weight.planes[0];
    const int64_t batch = weight.geometry.batch, height = weight.geometry.source_h;
    const int64_t length = weight.geometry.source_w * batch, grad_length = p.width * batch;
    return if_well_formed<T>({&weight, &input}, [&](int64_t channels, int threads) {
        const DepthwiseRows<T> products(weight, false), sums(input, false);
#pragma omp parallel num_threads(threads)
        {
            thread_local Scratch value_scratch, slope_scratch;
            thread_local typename DepthwiseRows<T>::Channel weight_channel;
            thread_local std::vector<typename DepthwiseRows<T>::Channel> input_channels;
            if (int64_t(input_channels.size()) < input.plane_count) input_channels.resize(size_t(input.plane_count));
            std::vector<int64_t> next(size_t(input.plane_count));  // row of each plane
            const std::unique_ptr<NormSteps<T>> inner = steps_of<T>(block.inner), outer = steps_of<T>(block.outer);
            Strip<T> values(value_scratch, height, length, of_weight.rows());
            Strip<T> slopes(slope_scratch, p.height, grad_length, of_input.rows());
#pragma omp for schedule(dynamic, 1)
            for (int64_t c = 0; c < channels; ++c) {
                T* to = static_cast<T*>(input.dest.data) + c * input.dest.c;
                outer->begin(c, channel_of<T>(block.outer.grad, block.outer, c));
                outer->add(0, block.outer.size);
                outer->finish();
                inner->begin(c, to);
                products.begin(0, c, &weight_channel);
                for (int64_t i = 0; i < input.plane_count; ++i) {
                    sums.begin(i, c, &input_channels[size_t(i)]);
                    next[size_t(i)] = 0;
                }
                values.begin();
                slopes.begin();
                int64_t summed = 0;
                for (int64_t y = 0; y < p.height; ++y) {
                    const int64_t row = y * weight.geometry.step_y;
                    const int64_t low = std::clamp<int64_t>(row + of_weight.low[0], 0, height);
                    const int64_t high = std::clamp<int64_t>(row + of_weight.high[0] + 1, low, height);
                    const T* source =
                        values.rows(low, high, [&](int64_t r, T* made) { inner->values(r * length, length, made); });

                    int64_t oldest = y;  // row of the gradient that the input gradient still needs
                    for (int64_t i = 0; i < input.plane_count; ++i)
                        if (next[size_t(i)] < input.planes[i].height)
                            oldest = std::min(oldest, std::max<int64_t>(next[size_t(i)] + of_input.low[size_t(i)], 0));
                    const T* grad = slopes.rows(oldest, y + 1, [&](int64_t r, T* made) {
                        outer->slopes(r * grad_length, grad_length, made, false);
                    });
                    products.products(y, source, grad, &weight_channel);

                    int64_t done = height;  // rows of the input gradient
                    for (int64_t i = 0; i < input.plane_count; ++i) {
                        const Plane& plane = input.planes[i];
                        int64_t& r = next[size_t(i)];
                        for (; r < plane.height && (r + of_input.high[size_t(i)] <= y || y + 1 == p.height); ++r)
                            sums.sums(r, grad, to, &input_channels[size_t(i)]);
                        if (r < plane.height) done = std::min(done, plane.dest_y + r * input.geometry.dest_step_y);
                    }
                    const int64_t end = done == height ? height * length : done * length / kChunk * kChunk;
                    if (end > summed) inner->add(summed, end);
                    summed = std::max(summed, end);
                }
                products.write_products(weight_channel);
                inner->finish();
                inner->slopes(0, block.inner.size, to, false);  // in its place
            }
        }
    });
}

}  // namespace

const char* norm_depthwise_forward(const NormDepthwise& block) {
    return with_element(block.sums.element, [&](auto element) { return forward<decltype(element)>(block); });
}

const char* norm_depthwise_backward(const NormDepthwise& block) {
    return with_element(block.sums.element, [&](auto element) { return backward<decltype(element)>(block); });
}

}  // namespace SPARSE_FT_ISA
}  // namespace sparse_ft
