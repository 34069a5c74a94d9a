// A depthwise convolution with the batch norm before it and the one after it, channel by channel: none of the three
// mixes channels, so that what one of them makes of a channel waits in the caches for the next.
//     forward:   rows of activation(norm(x)), the convolution's rows, their statistics
//     backward:  the outer norm's sums; row by row its gradient, the weight's and the input's; the inner norm's
// Forward reads x and writes y; backward reads x, y and a gradient and writes one. Every step is that of the pass by
// itself, and so are the results.
#include <memory>
#include <omp.h>
#include <optional>

#include "depthwise_rows.h"
#include "kernels.h"
#include "norm_channel.h"

namespace sparse_ft {
namespace SPARSE_FT_ISA {
namespace {

constexpr int64_t kStripBytes = 128 << 10;  // of the rows that wait for a convolution: two strips fit a small cache

// One norm's steps, whatever its activation. Elements count from the channel's beginning.
template <class T>
struct NormSteps {
    virtual ~NormSteps() = default;
    virtual void begin(int64_t c, const T* grad) = 0;                    // grad: of the norm's result, of this channel
    virtual void values(int64_t first, int64_t count, T* to) const = 0;  // activation(norm(x))
    virtual void add(int64_t first, int64_t end) = 0;                    // the way back: see ChannelGradient
    virtual void finish() = 0;
    virtual void slopes(int64_t first, int64_t count, T* to) const = 0;
};

template <class T, class Act>
class StepsOf : public NormSteps<T> {
  public:
    explicit StepsOf(const Norm& norm) : q(norm) {}
    void begin(int64_t c, const T* grad) override { number = c, gradient.emplace(q, c, grad); }
    void values(int64_t first, int64_t count, T* to) const override {
        const Channel<T> channel(q, number);
        each_vector(count, [&](int64_t i, int n) {
            store(to + i, Act::value(channel.template before_activation<false>(first + i, n)), n);
        });
    }
    void add(int64_t first, int64_t end) override { gradient->add(first, end, nullptr); }
    void finish() override { gradient->finish(); }
    void slopes(int64_t first, int64_t count, T* to) const override {
        const auto from = *gradient;  // a copy, whose numbers stay in registers whatever is written
        const auto write = [&](auto slope) {
            each_vector(count,
                        [&](int64_t i, int n) { store(to + i, slope(first + i, n, from.before(first + i, n)), n); });
        };
        if (q.training)
            write([&](int64_t i, int n, vec g) { return from.slope_in_training(i, n, g); });
        else
            write([&](int64_t, int, vec g) { return from.slope_as_given(g); });
    }

  private:
    const Norm& q;
    int64_t number = 0;
    std::optional<ChannelGradient<T, Act, Slope::kFromX>> gradient;
};

template <class T>
std::unique_ptr<NormSteps<T>> steps_of(const Norm& q) {
    std::unique_ptr<NormSteps<T>> steps;
    with_activation(q.activation, [&](auto act) { steps = std::make_unique<StepsOf<T, decltype(act)>>(q); });
    return steps;
}

// The rows of a channel that a convolution reads, made as they are needed, each between columns of zeros.
template <class T>
class Strip {
  public:
    // `length`: elements of a row; `reach`: how many rows are needed at a time.
    Strip(Scratch& scratch, int64_t height, int64_t length, int64_t left, int64_t right, int64_t reach)
        : left_(left), pitch_(left + length + right) {
        capacity_ = std::clamp<int64_t>(kStripBytes / int64_t(sizeof(T)) / pitch_, reach, std::max(height, reach));
        rows_ = scratch.of<T>(size_t(capacity_ * pitch_));
        for (int64_t r = 0; r < capacity_; ++r) {
            std::fill_n(rows_ + r * pitch_, left, T{});
            std::fill_n(rows_ + r * pitch_ + left + length, right, T{});
        }
    }
    void begin() { first_ = end_ = 0; }
    // Rows [low, high): where row 0 would be if all were there. Rows before `low` are not asked for again.
    template <class Make>
    const T* rows(int64_t low, int64_t high, Make make) {
        if (high > first_ + capacity_) {
            const int64_t kept = std::max<int64_t>(end_ - low, 0);
            std::memmove(rows_, rows_ + (end_ - kept - first_) * pitch_, size_t(kept * pitch_) * sizeof(T));
            first_ = low;
            end_ = low + kept;
        }
        for (; end_ < high; ++end_) make(end_, rows_ + (end_ - first_) * pitch_ + left_);
        return rows_ - first_ * pitch_;
    }

  private:
    int64_t left_, pitch_, capacity_, first_ = 0, end_ = 0;  // rows [first_, end_) are there
    T* rows_;
};

// A product that reads its source from a strip.
class FromStrip {
  public:
    explicit FromStrip(const Product& product) : q(product), planes(product.planes, product.planes + q.plane_count) {
        const Geometry& g = q.geometry;
        for (const Plane& p : planes) {
            low.push_back(least(p.tap_y, g.taps_h));
            high.push_back(most(p.tap_y, g.taps_h));
            left = std::max(left, -least(p.tap_x, g.taps_w));
            right = std::max(right, (p.width - 1) * g.step_x + most(p.tap_x, g.taps_w) - (g.source_w - 1));
        }
        left = right = 0;
        taps.reserve(planes.size());
        for (Plane& p : planes) {
            taps.emplace_back(p.tap_x, p.tap_x + g.taps_w);
            for (int32_t& tap : taps.back())
                if (tap != kNoTap) tap += int32_t(left);
            p.tap_x = taps.back().data();
        }
        q.planes = planes.data();
        q.geometry.source_w += left + right;
        q.source.x = g.batch;
        q.source.y = q.geometry.source_w * g.batch;
    }
    FromStrip(const FromStrip&) = delete;  // the product points into it

    Product q;
    int64_t left = 0, right = 0;     // columns of zeros
    std::vector<int64_t> low, high;  // of each plane: the least and the greatest offset of a row that it reads
    int64_t reach() const {
        const int64_t least = *std::min_element(low.begin(), low.end());
        const int64_t most = *std::max_element(high.begin(), high.end());
        return std::max<int64_t>(most, 0) - std::min<int64_t>(least, 0) + 1;
    }

  private:
    std::vector<Plane> planes;
    std::vector<std::vector<int32_t>> taps;
    static int64_t least(const int32_t* taps, int64_t count) {
        int32_t found = INT32_MAX;
        for (int64_t k = 0; k < count; ++k)
            if (taps[k] != kNoTap) found = std::min(found, taps[k]);
        return found == INT32_MAX ? 0 : found;
    }
    static int64_t most(const int32_t* taps, int64_t count) {
        int32_t found = INT32_MIN;
        for (int64_t k = 0; k < count; ++k)
            if (taps[k] != kNoTap) found = std::max(found, taps[k]);
        return found == INT32_MIN ? 0 : found;
    }
};

// Calls each(channel) for all channels of depthwise products that are as they should be.
template <class T, class Each>
const char* each_channel(std::initializer_list<const Product*> products, Each each) {
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
    each(channels, one.threads);
    return nullptr;
}

template <class T>
const char* forward(const NormDepthwise& block) {
    const FromStrip from(block.sums);
    const Product& q = from.q;
    const Plane& p = q.planes[0];
    const int64_t height = block.sums.geometry.source_h, length = block.sums.geometry.source_w * q.source.x;
    return each_channel<T>({&q}, [&](int64_t channels, int threads) {
        const DepthwiseRows<T> convolution(q, false);
#pragma omp parallel num_threads(threads)
        {
            thread_local Scratch scratch;
            thread_local typename DepthwiseRows<T>::Channel channel;
            const std::unique_ptr<NormSteps<T>> inner = steps_of<T>(block.inner);
            Strip<T> strip(scratch, height, length, from.left * q.source.x, from.right * q.source.x, from.reach());
#pragma omp for schedule(dynamic, 1)
            for (int64_t c = 0; c < channels; ++c) {
                T* to = static_cast<T*>(q.dest.data) + c * q.dest.c;
                inner->begin(c, nullptr);
                convolution.begin(0, c, &channel);
                strip.begin();
                for (int64_t y = 0; y < p.height; ++y) {
                    const int64_t row = y * q.geometry.step_y;
                    const int64_t low = std::clamp<int64_t>(row + from.low[0], 0, height);
                    const int64_t high = std::clamp<int64_t>(row + from.high[0] + 1, low, height);
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
    const FromStrip values(block.products), slopes(block.sums);
    const Product &weight = values.q, &input = slopes.q;
    const Plane& p = weight.planes[0];
    const int64_t height = block.products.geometry.source_h,
                  length = block.products.geometry.source_w * weight.source.x;
    const int64_t made_length = p.width * weight.source.x;
    // The gradient's rows lie as the input gradient's source.
    Product products = weight;
    products.grad = input.source;
    return each_channel<T>({&products, &input}, [&](int64_t channels, int threads) {
        const DepthwiseRows<T> of_weight(products, false), of_input(input, false);
#pragma omp parallel num_threads(threads)
        {
            thread_local Scratch value_scratch, slope_scratch;
            thread_local typename DepthwiseRows<T>::Channel weight_channel;
            thread_local std::vector<typename DepthwiseRows<T>::Channel> input_channels;
            if (int64_t(input_channels.size()) < input.plane_count) input_channels.resize(size_t(input.plane_count));
            std::vector<int64_t> next(size_t(input.plane_count));  // row of each plane
            const std::unique_ptr<NormSteps<T>> inner = steps_of<T>(block.inner), outer = steps_of<T>(block.outer);
            const int64_t n = weight.source.x;
            Strip<T> value_strip(value_scratch, height, length, values.left * n, values.right * n, values.reach());
            Strip<T> slope_strip(slope_scratch, p.height, made_length, slopes.left * n, slopes.right * n,
                                 slopes.reach());
#pragma omp for schedule(dynamic, 1)
            for (int64_t c = 0; c < channels; ++c) {
                T* to = static_cast<T*>(input.dest.data) + c * input.dest.c;
                outer->begin(c, channel_of<T>(block.outer.grad, block.outer, c));
                outer->add(0, block.outer.size);
                outer->finish();
                inner->begin(c, to);
                of_weight.begin(0, c, &weight_channel);
                for (int64_t i = 0; i < input.plane_count; ++i) {
                    of_input.begin(i, c, &input_channels[size_t(i)]);
                    next[size_t(i)] = 0;
                }
                value_strip.begin();
                slope_strip.begin();
                int64_t summed = 0;
                for (int64_t y = 0; y < p.height; ++y) {
                    const int64_t row = y * weight.geometry.step_y;
                    const int64_t low = std::clamp<int64_t>(row + values.low[0], 0, height);
                    const int64_t high = std::clamp<int64_t>(row + values.high[0] + 1, low, height);
                    const T* source = value_strip.rows(
                        low, high, [&](int64_t r, T* made) { inner->values(r * length, length, made); });

                    int64_t oldest = y;  // row of the gradient that the input gradient still needs
                    for (int64_t i = 0; i < input.plane_count; ++i)
                        if (next[size_t(i)] < input.planes[i].height)
                            oldest = std::min(oldest, std::max<int64_t>(next[size_t(i)] + slopes.low[size_t(i)], 0));
                    const T* grad = slope_strip.rows(
                        oldest, y + 1, [&](int64_t r, T* made) { outer->slopes(r * made_length, made_length, made); });
                    // The gradient as the weight's product reads it, without the columns of zeros.
                    of_weight.products(y, source, grad + slopes.left * n, &weight_channel);

                    int64_t done = height;  // rows of the input gradient
                    for (int64_t i = 0; i < input.plane_count; ++i) {
                        const Plane& plane = input.planes[i];
                        int64_t& r = next[size_t(i)];
                        for (; r < plane.height && (r + slopes.high[size_t(i)] <= y || y + 1 == p.height); ++r)
                            of_input.sums(r, grad, to, &input_channels[size_t(i)]);
                        if (r < plane.height) done = std::min(done, plane.dest_y + r * input.geometry.dest_step_y);
                    }
                    const int64_t sums_end = done == height ? height * length : done * length / kChunk * kChunk;
                    if (sums_end > summed) inner->add(summed, sums_end);
                    summed = std::max(summed, sums_end);
                }
                of_weight.write_products(weight_channel);
                inner->finish();
                inner->slopes(0, block.inner.size, to);  // in its place
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
