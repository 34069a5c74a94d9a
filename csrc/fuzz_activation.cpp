// What works on activations: norms, pooling, changes of layout, dropout, and keeping the largest values.
#include "convolution.h"
#include "fuzz.h"

namespace sparse_ft {
namespace fuzz {

namespace {

// x, residual, y: what q has, as floats.
void check_norm(const Norm& q, const float* all_x, const float* all_residual, const float* y) {
    std::vector<double> expected, size;
    for (int64_t c = 0; c < q.channels; ++c) {
        const float* x = all_x + c * q.size;
        double mean = q.mean[c], variance = q.variance[c];
        if (q.measure) {
            mean = variance = 0;
            for (int64_t i = 0; i < q.size; ++i) mean += x[i] / double(q.size);
            for (int64_t i = 0; i < q.size; ++i) variance += (x[i] - mean) * (x[i] - mean) / double(q.size);
        }
        const double scale = (q.weight ? q.weight[c] : 1) / std::sqrt(variance + q.eps);
        for (int64_t i = 0; i < q.size; ++i) {
            const double residual = q.residual ? all_residual[c * q.size + i] : 0, bias = q.bias ? q.bias[c] : 0;
            expected.push_back(activated(q.activation, (x[i] - mean) * scale + bias + residual));
            size.push_back((std::abs(x[i]) + std::abs(mean)) * std::abs(scale));
        }
    }
    compare(y, expected, size, "a norm differs from plain loops", q.element);
}

void check_pool(const Pool& q, bool maximum, const float* input, const float* output) {
    std::vector<double> expected, size;
    for (int64_t c = 0; c < q.channels; ++c)
        for (int64_t oy = 0; oy < q.y.count; ++oy)
            for (int64_t ox = 0; ox < q.x.count; ++ox)
                for (int64_t n = 0; n < q.batch; ++n) {
                    double sum = 0, most = -HUGE_VAL, terms = 0;
                    for (int32_t ty = q.y.low[oy]; ty < q.y.high[oy]; ++ty)
                        for (int32_t tx = q.x.low[ox]; tx < q.x.high[ox]; ++tx) {
                            const int64_t row = q.y.first[oy] + int64_t(ty) * q.y.step;
                            const int64_t column = q.x.first[ox] + int64_t(tx) * q.x.step;
                            const double v = input[((c * q.y.size + row) * q.x.size + column) * q.batch + n];
                            sum += v;
                            terms += std::abs(v);
                            most = std::max(most, v);
                        }
                    const double weight = maximum ? 1 : double(q.y.scale[oy]) * q.x.scale[ox];
                    expected.push_back(maximum ? most : weight * sum);
                    size.push_back(weight * terms);
                }
    compare(output, expected, size, "pooling differs from plain loops", q.element);
}

}  // namespace

void fuzz_norm(Bytes& in, const Kernels& kernels) {
    Norm q{};
    q.channels = in.small(0, 9);
    q.size = in.small(0, 70);
    q.activation = activation_of(int(in.number(0, 6)));
    q.threads = int(in.small(1, 3));
    q.eps = 1e-5f;
    const int64_t numel = q.channels * q.size;
    const uint8_t given = in.byte();
    const uint32_t seed = in.word();
    Floats x(numel, false), residual(numel, false), y(numel, false), grad(numel, false), grad_x(numel, false),
        grad_residual(numel, false), weight(q.channels, false), bias(q.channels, false), mean(q.channels, false),
        variance(q.channels, false), rstd(q.channels, false), grad_weight(q.channels, false),
        grad_bias(q.channels, false);
    for (const Floats* floats : {&x, &residual, &grad, &weight, &bias, &mean}) fill(*floats, seed);
    for (int64_t i = 0; i < q.channels; ++i) variance[i] = std::abs(mean[i]);
    const bool is_odd = in.byte() > 240;
    if (is_odd)
        for (const Floats* floats : {&x, &residual, &weight, &mean, &variance, &grad})
            spoil(floats->get(), floats->size(), seed + uint32_t(floats->size()));
    q.element = element_of(int(in.small(0, 1)));
    const Stored stored_x(x, q.element), stored_residual(residual, q.element), stored_y(y, q.element),
        stored_grad(grad, q.element), stored_grad_x(grad_x, q.element), stored_grad_residual(grad_residual, q.element);
    q.x = stored_x.get();
    q.residual = given & 1 ? stored_residual.get() : nullptr;
    q.weight = given & 2 ? weight.get() : nullptr;
    q.bias = given & 2 ? bias.get() : nullptr;
    q.mean = mean.get();
    q.variance = variance.get();
    q.rstd = rstd.get();
    q.measure = given & 4;
    q.y = given & 8 ? stored_y.get() : nullptr;
    kernels.norm_forward(q);
    stored_y.finish();
    std::snprintf(described, sizeof described, "%s norm of type %d: %ld x %ld, activation %d, given %d", kernels.name,
                  int(q.element), long(q.channels), long(q.size), int(q.activation), given);
    if (q.y && !is_odd) check_norm(q, x.get(), residual.get(), y.get());
    q.grad = stored_grad.get();
    q.output = given & 8 ? stored_y.get() : nullptr;
    q.training = q.measure;
    q.grad_x = given & 16 ? stored_grad_x.get() : nullptr;
    q.grad_residual = given & 32 && q.residual ? stored_grad_residual.get() : nullptr;
    q.grad_weight = given & 64 ? grad_weight.get() : nullptr;
    q.grad_bias = given & 64 ? grad_bias.get() : nullptr;
    kernels.norm_backward(q);
    stored_grad_x.finish();
    for (int64_t i = 0; i < (is_odd ? 0 : numel); ++i)
        if (std::isnan(grad_x[i])) fail("the gradient of a norm of finite numbers is not a number");
}

namespace {

std::unique_ptr<PoolAxis> pool_axis(Bytes& in, bool maximum) {
    const int64_t size = in.number(0, 12);
    std::vector<int32_t> first, end;
    std::vector<float> scale;
    for (int64_t i = in.small(0, 6); i > 0; --i) {
        first.push_back(int32_t(in.number(-3, 12)));
        if (maximum) continue;
        end.push_back(int32_t(int64_t(first.back()) + (first.back() < 100 ? in.small(0, 4) : 0)));
        scale.push_back(0.5f);
    }
    if (maximum)
        return std::make_unique<PoolAxis>(size, first, int32_t(in.number(1, 15)), int32_t(in.number(1, 3)), scale);
    return std::make_unique<PoolAxis>(size, first, end, scale);
}

}  // namespace

void fuzz_pool(Bytes& in, const Kernels& kernels) {
    const bool maximum = in.byte() % 2;
    const auto y = pool_axis(in, maximum), x = pool_axis(in, maximum);
    if (maximum && int64_t(y->windows.taps) * x->windows.taps > 255) throw TooLarge();  // refused above this level
    const int64_t batch = in.small(0, 40), channels = in.small(0, 3);
    const int64_t from = product_of({batch, channels, y->windows.size, x->windows.size});
    const int64_t to = product_of({batch, channels, y->windows.count, x->windows.count});
    Floats input(from, false), output(to, false), grad(to, false), grad_input(from, false);
    Buffer<uint8_t> chosen(to, false);
    fill(input, in.word());
    fill(grad, 1);
    const Element element = element_of(int(in.small(0, 1)));
    const Stored stored_input(input, element), stored_output(output, element), stored_grad(grad, element),
        stored_grad_input(grad_input, element);
    Pool q{batch,
           channels,
           element,
           y->windows,
           x->windows,
           stored_input.get(),
           stored_output.get(),
           maximum ? chosen.get() : nullptr,
           nullptr,
           nullptr,
           int(in.small(1, 3))};
    kernels.pool_forward(q);
    stored_output.finish();
    check_pool(q, maximum, input.get(), output.get());
    for (int64_t i = 0; i < to && in.size > 0; ++i) chosen[i] = in.byte();  // a saved tensor that was written to
    q.grad = stored_grad.get();
    q.grad_input = stored_grad_input.get();
    kernels.pool_backward(q);
}

// One pass has the results of two, to the last bit.
void fuzz_norm_pool(Bytes& in, const Kernels& kernels) {
    const auto y = pool_axis(in, true), x = pool_axis(in, true);
    if (int64_t(y->windows.taps) * x->windows.taps > 255) throw TooLarge();
    const int64_t batch = in.small(0, 40), channels = in.small(0, 3);
    const int64_t size = product_of({batch, y->windows.size, x->windows.size});
    const int64_t results = product_of({batch, y->windows.count, x->windows.count});
    Floats input(channels * size, false), activated(channels * size, false), through(channels * size, false),
        grad_input(channels * size, false), output(channels * results, false), grad(channels * results, false);
    Floats weight(channels, false), bias(channels, false), mean(channels, false), variance(channels, false),
        rstd(channels, false), grad_weight(channels, false), grad_bias(channels, false);
    Buffer<uint8_t> chosen(channels * results, false);
    const uint32_t seed = in.word();
    for (const Floats* floats : {&input, &weight, &bias, &mean, &grad}) fill(*floats, seed);
    for (int64_t i = 0; i < channels; ++i) variance[i] = std::abs(mean[i]);
    const Element element = element_of(int(in.small(0, 1)));
    const Stored stored_input(input, element), stored_activated(activated, element), stored_through(through, element),
        stored_grad_input(grad_input, element), stored_output(output, element), stored_grad(grad, element);

    Norm norm{};
    norm.channels = channels;
    norm.size = size;
    norm.element = element;
    norm.activation = activation_of(int(in.number(0, 6)));
    norm.training = in.byte() % 2;
    norm.threads = int(in.small(1, 3));
    norm.eps = 1e-5f;
    norm.x = stored_input.get();
    norm.weight = weight.get();
    norm.bias = bias.get();
    norm.mean = mean.get();
    norm.variance = variance.get();
    norm.rstd = rstd.get();
    norm.y = stored_activated.get();
    Pool pool{batch,
              channels,
              element,
              y->windows,
              x->windows,
              stored_activated.get(),
              stored_output.get(),
              chosen.get(),
              stored_grad.get(),
              stored_through.get(),
              norm.threads};
    kernels.norm_forward(norm);
    kernels.pool_forward(pool);
    kernels.pool_backward(pool);
    norm.grad = stored_through.get();
    norm.grad_x = stored_grad_input.get();
    norm.grad_weight = grad_weight.get();
    norm.grad_bias = grad_bias.get();
    kernels.norm_backward(norm);
    std::snprintf(described, sizeof described, "%s norm and pooling of type %d: %ld of %ld x %ld x %ld", kernels.name,
                  int(element), long(channels), long(y->windows.size), long(x->windows.size), long(batch));

    const auto bytes = [](const void* from, int64_t count) {
        const auto* first = static_cast<const uint8_t*>(from);
        return std::vector<uint8_t>(first, first + count);
    };
    const int64_t width = element_bytes(element), floats = channels * int64_t(sizeof(float));
    const auto all = [&] {
        std::vector<std::vector<uint8_t>> found{bytes(stored_output.get(), channels * results * width),
                                                bytes(chosen.get(), channels * results),
                                                bytes(stored_grad_input.get(), channels * size * width),
                                                bytes(grad_weight.get(), floats), bytes(grad_bias.get(), floats)};
        return found;
    };
    const auto expected = all();
    pool.input = norm.grad = norm.y = nullptr;  // not stored
    pool.grad_input = nullptr;
    kernels.norm_pool_forward({norm, pool});
    kernels.norm_pool_backward({norm, pool});
    if (all() != expected) fail("pooling of a norm differs from both one by one");
}

void fuzz_transpose(Bytes& in, const Kernels& kernels, bool guarded) {
    Transpose q{};
    q.batch_outer = in.small(0, 3);
    q.batch_inner = in.small(0, 9);
    q.rows = in.small(0, 70);
    q.cols = in.small(0, 70);
    q.threads = int(in.small(1, 3));
    const int64_t pad = in.small(0, 2);
    q.from_row = q.cols + pad;
    q.from_inner = q.rows * q.from_row;
    q.from_outer = q.batch_inner * q.from_inner;
    q.to_col = q.rows + pad;
    q.to_inner = q.cols * q.to_col;
    q.to_outer = q.batch_inner * q.to_inner;
    const bool at_end = in.byte() % 2;
    Floats from(product_of({q.batch_outer, q.batch_inner, q.rows, q.from_row}), guarded, at_end),
        to(product_of({q.batch_outer, q.batch_inner, q.cols, q.to_col}), guarded, at_end);
    fill(from, in.word());
    q.element = element_of(int(in.small(0, 1)));
    const Stored stored_from(from, q.element, guarded, at_end), stored_to(to, q.element, guarded, at_end);
    q.from = stored_from.get();
    q.to = stored_to.get();
    kernels.transpose(q);
    stored_to.finish();
    for (int64_t b = 0; b < q.batch_outer * q.batch_inner; ++b)
        for (int64_t i = 0; i < q.rows; ++i)
            for (int64_t k = 0; k < q.cols; ++k)
                if (from[b * q.from_inner + i * q.from_row + k] != to[b * q.to_inner + k * q.to_col + i])
                    fail("a transpose differs");
}

namespace {

// Philox4x32-10, as its definition has it.
uint32_t random_word(uint64_t seed, uint64_t i) {
    uint32_t word[4] = {uint32_t(i / 4), uint32_t(i / 4 >> 32), 0, 0};
    uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        const uint64_t left = uint64_t(word[0]) * 0xD2511F53u, right = uint64_t(word[2]) * 0xCD9E8D57u;
        const uint32_t next[4] = {uint32_t(right >> 32) ^ word[1] ^ key[0], uint32_t(right),
                                  uint32_t(left >> 32) ^ word[3] ^ key[1], uint32_t(left)};
        std::memcpy(word, next, sizeof word);
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return word[i % 4];
}

}  // namespace

void fuzz_dropout(Bytes& in, const Kernels& kernels, bool guarded) {
    Dropout q{};
    q.size = in.small(0, 255) * in.small(1, 5);
    q.threads = int(in.small(1, 3));
    q.seed = uint64_t(in.word()) << 32 | in.word();
    q.least_kept = in.word();
    q.scale = 1.5f;
    q.element = element_of(int(in.small(0, 1)));
    const bool at_end = in.byte() % 2;
    Floats x(q.size, guarded, at_end), y(q.size, guarded, at_end);
    fill(x, in.word());
    const Stored stored_x(x, q.element, guarded, at_end), stored_y(y, q.element, guarded, at_end);
    q.x = stored_x.get();
    q.y = stored_y.get();
    kernels.dropout(q);
    stored_y.finish();
    std::snprintf(described, sizeof described, "%s dropout of type %d: %ld", kernels.name, int(q.element),
                  long(q.size));
    std::vector<double> expected, size(size_t(q.size), 0.0);
    for (int64_t i = 0; i < q.size; ++i)
        expected.push_back(random_word(q.seed, uint64_t(i)) >= q.least_kept ? x[i] * 1.5 : 0);
    compare(y.get(), expected, size, "dropout differs from plain loops", q.element);
}

// An activation whose largest values are kept, what is made of it again, and the weight gradient from it
// (sparse_ft/ops/compact.py).
void fuzz_compact(Bytes& in, const Kernels& kernels, bool guarded) {
    Convolution c{};
    c.groups = in.small(1, 3);
    c.weight = {in.small(1, 40) * c.groups, in.small(1, 9), in.small(1, 4), in.small(1, 4)};
    for (int i = 0; i < 2; ++i) {
        c.stride[size_t(i)] = in.small(1, 3);
        c.padding[size_t(i)] = in.small(0, 4);
        c.dilation[size_t(i)] = in.small(1, 3);
    }
    const bool flat = in.byte() % 3 == 0;  // positions are samples
    if (flat) {
        c.weight[2] = c.weight[3] = 1;
        c.stride = c.dilation = {1, 1};
        c.padding = {0, 0};
    }
    check(c);
    const int64_t n = in.small(1, 40), channels = c.weight[1] * c.groups, h = in.small(1, 12), w = in.small(1, 12);
    Two out;
    for (int i = 0; i < 2; ++i) {
        const int64_t extent = (i ? w : h) + c.padding[size_t(i)] + (flat ? 0 : in.small(0, 3));
        const int64_t reach = c.dilation[size_t(i)] * (c.weight[size_t(2 + i)] - 1) + 1;
        if (extent < reach) throw TooLarge();
        out[size_t(i)] = (extent - reach) / c.stride[size_t(i)] + 1;
    }
    const int threads = int(in.small(1, 3));
    const uint32_t seed = in.word();
    const uint8_t level = in.byte();
    const bool is_odd = in.byte() > 240, at_end = in.byte() % 2;
    float threshold = is_odd ? 1 : float(level) / 100;
    if (is_odd && level % 2) spoil(&threshold, 1, seed);
    Floats x(product_of({n, channels, h, w}), guarded, at_end), again(x.size(), guarded, at_end);
    fill(x, seed);
    if (is_odd) spoil(x.get(), x.size(), seed);

    Compact a{};
    const int64_t samples = n * h * w;
    View view;
    if (flat) {
        const int64_t most = int64_t(8) << in.byte() % 7;
        a.lanes = samples;
        a.block_lanes = std::min(most, (samples + 7) / 8 * 8);
        a.column_lanes = 8;
        a.column_step = 1;
        a.blocks = (samples + a.block_lanes - 1) / a.block_lanes;
        a.height = 1;
        a.width = a.block_lanes / 8;
        view = {x.get(), 1, samples, 0, 8};
    } else {
        a.lanes = n;
        a.block_lanes = 8;
        a.column_lanes = 0;
        a.column_step = c.stride[1];
        a.blocks = (n + 7) / 8;
        a.height = h;
        a.width = w;
        view = layout(x.get(), n, channels, h, w, true);
    }
    a.channels = channels;
    std::snprintf(described, sizeof described,
                  "%s compact: weight %ld %ld %ld %ld, groups %ld, stride %ld %ld, padding %ld %ld, dilation %ld %ld, "
                  "input %ld %ld %ld, output %ld %ld, flat %d, threshold %g, threads %d",
                  kernels.name, long(c.weight[0]), long(c.weight[1]), long(c.weight[2]), long(c.weight[3]),
                  long(c.groups), long(c.stride[0]), long(c.stride[1]), long(c.padding[0]), long(c.padding[1]),
                  long(c.dilation[0]), long(c.dilation[1]), long(n), long(h), long(w), long(out[0]), long(out[1]),
                  flat, double(threshold), threads);
    Buffer<uint8_t> bits(product_of({a.blocks, channels, a.height, a.width}), guarded, at_end);
    Buffer<int64_t> start(a.blocks * channels + 1, guarded, at_end);
    kernels.compact_bits(a, view, threshold, bits.get(), start.get() + 1, threads);
    for (int64_t i = 0; i < a.blocks * channels; ++i) start[i + 1] += start[i];
    auto is_kept = [&](float v) { return !(std::abs(v) <= threshold); };
    const int64_t kept = std::count_if(x.get(), x.get() + x.size(), is_kept);
    if (start[a.blocks * channels] != kept) fail("other than the values above the threshold are kept");
    Floats values(kept, guarded, at_end);
    a.bits = bits.get();
    a.start = start.get();
    kernels.compact_values(a, view, values.get(), threads);
    a.values = values.get();
    View there = view;
    there.data = again.get();
    kernels.compact_expand(a, there, threads);
    for (int64_t i = 0; i < x.size(); ++i) {
        const float expected = is_kept(x[i]) ? x[i] : 0.0f;
        if (std::memcmp(&expected, &again[i], sizeof expected) != 0) fail("a kept value comes back as another");
    }
    if (kept == 0) return;  // the operator answers that by itself

    Floats grad(product_of({n, c.weight[0], out[0], out[1]}), guarded, at_end),
        weight_grad(product_of({c.weight[0], c.weight[1], c.weight[2], c.weight[3]}), guarded, at_end);
    fill(grad, seed + 1);
    const View plain = layout(grad.get(), n, c.weight[0], out[0], out[1], true);
    const View given = flat ? View{grad.get(), 1, samples, 0, 8} : plain;
    const int64_t count = kernels.compact_gradient(
        {pattern_shape(c), a, flat ? 1 : out[0], flat ? a.width : out[1], given, weight_grad.get(), threads});
    if (is_odd) return;
    std::vector<double> expected(size_t(weight_grad.size()), 0), size(expected);
    int64_t least = 0;  // multiply-adds that are of use
    const View source = layout(again.get(), n, channels, h, w, true);
    for (int64_t r = 0; r < c.weight[0]; ++r)
        for (int64_t k = 0; k < c.weight[1]; ++k)
            for (int64_t ky = 0; ky < c.weight[2]; ++ky)
                for (int64_t kx = 0; kx < c.weight[3]; ++kx) {
                    const size_t place = size_t(((r * c.weight[1] + k) * c.weight[2] + ky) * c.weight[3] + kx);
                    const int64_t channel = r / c.out_per_group() * c.weight[1] + k;
                    for (int64_t oy = 0; oy < out[0]; ++oy)
                        for (int64_t ox = 0; ox < out[1]; ++ox) {
                            const int64_t sy = oy * c.stride[0] + ky * c.dilation[0] - c.padding[0];
                            const int64_t sx = ox * c.stride[1] + kx * c.dilation[1] - c.padding[1];
                            if (sy < 0 || sy >= h || sx < 0 || sx >= w) continue;
                            for (int64_t b = 0; b < n; ++b) {
                                const double v = at(source, b, channel, sy, sx);
                                const double term = v * at(plain, b, r, oy, ox);
                                expected[place] += term;
                                size[place] += std::abs(term);
                                least += v != 0;
                            }
                        }
                }
    compare(weight_grad.get(), expected, size, "the gradient of what was kept differs from plain loops");
    if (count < least) fail("multiply-adds are miscounted");
}

}  // namespace fuzz
}  // namespace sparse_ft
