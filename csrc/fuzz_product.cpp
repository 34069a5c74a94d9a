// The two products over a pattern, as operators call them (api.h, convolution.h). What must hold, besides the
// sanitizers' silence:
//   - a product accepts a pattern if and only if it is well-formed, and writes nothing if it is not;
//   - of a well-formed one it computes what plain loops compute, on every instruction set.
#include "convolution.h"
#include "fuzz.h"
#include "programs.h"

namespace sparse_ft {
namespace fuzz {

// Of every row of a product's results, as they were stored.
void check_moments(const View& y, int64_t rows, int64_t n, const Two& out, const Floats& means,
                   const Floats& variances) {
    std::vector<double> mean(size_t(rows), 0), square(size_t(rows), 0), variance(size_t(rows), 0);
    const double count = double(n * out[0] * out[1]);
    const auto each = [&](auto body) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t b = 0; b < n; ++b)
                for (int64_t oy = 0; oy < out[0]; ++oy)
                    for (int64_t ox = 0; ox < out[1]; ++ox) body(size_t(r), double(at(y, b, r, oy, ox)));
    };
    each([&](size_t r, double v) { mean[r] += v / count, square[r] += v * v / count; });
    each([&](size_t r, double v) { variance[r] += (v - mean[r]) * (v - mean[r]) / count; });
    std::vector<double> size(size_t(rows), 0);
    for (size_t r = 0; r < size.size(); ++r) size[r] = std::sqrt(square[r]);
    compare(means.get(), mean, size, "means differ from plain loops");
    compare(variances.get(), variance, square, "variances differ from plain loops");
}

void fuzz_product(Bytes& in, const Kernels& kernels, bool guarded) {
    Convolution c{};
    c.groups = in.number(1, 4);
    c.weight = {in.number(0, 24), in.number(0, 20), in.number(1, 4), in.number(1, 4)};
    if (in.byte() % 2) c.weight[0] = std::clamp<int64_t>(c.weight[0], -1, 64) * std::clamp<int64_t>(c.groups, -1, 8);
    if (in.byte() % 4 == 0) c.groups = c.weight[0], c.weight[1] = 1;  // depthwise
    if (in.byte() % 4 == 0) c.weight[2] = c.weight[3] = 1;
    for (int i = 0; i < 2; ++i) {
        c.stride[size_t(i)] = in.number(1, 3);
        c.padding[size_t(i)] = in.number(0, 3);
        c.dilation[size_t(i)] = in.number(1, 3);
    }
    // The two ways in which the core is called: a convolution in batch-last layout, a linear layer token by token.
    const bool batch_last = in.byte() % 3 != 0;
    if (!batch_last) {
        c.weight[2] = c.weight[3] = 1;
        c.stride = c.dilation = {1, 1};
        c.padding = {0, 0};
    }
    check(c);
    const int64_t rows = c.weight[0], channels = c.weight[1] * c.groups, taps = c.weight[2] * c.weight[3];
    const int64_t cols = c.weight[1] * taps, phases = c.stride[0] * c.stride[1];
    const int64_t n = in.number(0, 40), height = batch_last ? in.number(1, 12) : 1,
                  width = batch_last ? in.number(1, 12) : 1;
    product_of({n, height, width});
    Two out;
    for (int i = 0; i < 2; ++i) {
        const int64_t after = batch_last ? in.number(0, 3) : 0;  // padding below and to the right
        const int64_t extent = (i ? width : height) + c.padding[size_t(i)] + after;
        const int64_t reach = c.dilation[size_t(i)] * (c.weight[size_t(2 + i)] - 1) + 1;
        if (after < 0 || after > (1 << 20) || extent < reach) throw TooLarge();
        out[size_t(i)] = (extent - reach) / c.stride[size_t(i)] + 1;
    }
    const bool at_end = in.byte() % 2;
    Floats x(product_of({n, channels, height, width}), guarded, at_end),
        y(product_of({n, rows, out[0], out[1]}), guarded, at_end);
    const View vx = layout(x.get(), n, channels, height, width, batch_last);
    const View vy = layout(y.get(), n, rows, out[0], out[1], batch_last);

    // The pattern of a random mask, through the functions that make patterns.
    const int64_t numel = product_of({rows, cols});
    const uint8_t density = in.byte();
    const uint32_t seed = in.word();
    std::minstd_rand random(seed + 1);
    Buffer<uint8_t> mask(numel, guarded);
    Floats weight(numel, guarded);
    fill(weight, seed);
    for (int64_t i = 0; i < numel; ++i) mask[i] = random() % 256 <= density;
    const int threads = int(in.small(1, 3));
    const int64_t nnz = count_true(mask.get(), numel, threads);
    const int64_t t_rows = product_of({phases, channels});
    Ints row_ptr(rows + 1, guarded), col(nnz, guarded), t_row_ptr(t_rows + 1, guarded), t_col(nnz, guarded),
        perm(nnz, guarded);
    Floats values(nnz, guarded), bias(rows, guarded), value_grad(nnz, guarded);
    build_rows(weight.get(), mask.get(), rows, cols, row_ptr.get(), col.get(), values.get(), threads);
    if (validate_rows(row_ptr.get(), rows, col.get(), nnz, cols) != nullptr) fail("a built pattern is malformed");
    const PatternShape shape = pattern_shape(c);
    build_transpose(shape, row_ptr.get(), col.get(), t_row_ptr.get(), t_col.get(), perm.get(), threads);
    if (validate_rows(t_row_ptr.get(), t_rows, t_col.get(), nnz, c.out_per_group() * taps) != nullptr)
        fail("a transposed pattern is malformed");
    fill(bias, seed + 1);
    // A norm that the source goes through as it is packed; now and then one of numbers that are none.
    const uint8_t with_norm = batch_last ? in.byte() : 0;
    const bool is_odd = with_norm > 240;
    Floats mean(channels, guarded), scale(channels, guarded), offset(channels, guarded);
    fill(mean, seed + 4), fill(scale, seed + 5), fill(offset, seed + 6);
    if (is_odd) spoil(mean.get(), channels, seed), spoil(scale.get(), channels, seed + 1);
    const SourceNorm norm{mean.get(), scale.get(), offset.get(), Activation(with_norm % 7)};

    const int which = int(in.small(0, 2));
    const Element element = element_of(int(in.small(0, 1)));
    // What a result goes through as it is stored.
    const uint8_t with_result = batch_last ? in.byte() : 0;
    Floats result_mean(rows, guarded), result_scale(rows, guarded), result_offset(rows, guarded),
        residual(with_result % 2 ? y.size() : 0, guarded, at_end), row_sums(rows, guarded);
    fill(result_mean, seed + 7), fill(result_scale, seed + 8), fill(result_offset, seed + 9),
        fill(residual, seed + 10);
    const Stored stored_residual(residual, element, guarded, at_end);
    const ResultNorm result{result_mean.get(), result_scale.get(), result_offset.get(),
                            with_result % 2 ? stored_residual.get() : nullptr, Activation(with_result / 2 % 7)};
    Floats taken_mean(rows, guarded), taken_variance(rows, guarded);
    bool spoilt = false;
    std::vector<int32_t> t_before(t_col.get(), t_col.get() + nnz);
    for (int64_t i = in.byte() % 4 == 0 ? in.small(1, 3) : 0; i > 0; --i) {
        const Ints* arrays[] = {&row_ptr, &col, &t_row_ptr, &t_col, &perm};
        const Ints& array = *arrays[which == 1 ? 2 + in.byte() % 3 : in.byte() % 2];
        if (array.size() == 0) continue;
        int32_t& entry = array[in.word() % array.size()];
        const int32_t value = in.byte() % 2 ? int32_t(in.word()) : entry + int32_t(in.small(0, 8)) - 4;
        spoilt |= value != entry;
        entry = value;
    }
    std::snprintf(described, sizeof described,
                  "%s product %d of type %d: weight %ld %ld %ld %ld, groups %ld, stride %ld %ld, padding %ld %ld, "
                  "dilation %ld %ld, "
                  "input %ld %ld %ld, output %ld %ld, batch-last %d, nnz %ld, threads %d, norm %d, result %d",
                  kernels.name, which, int(element), long(c.weight[0]), long(c.weight[1]), long(c.weight[2]),
                  long(c.weight[3]), long(c.groups), long(c.stride[0]), long(c.stride[1]), long(c.padding[0]),
                  long(c.padding[1]), long(c.dilation[0]), long(c.dilation[1]), long(n), long(height), long(width),
                  long(out[0]), long(out[1]), batch_last, long(nnz), threads, with_norm, with_result);
    const bool well_formed = validate_rows(row_ptr.get(), rows, col.get(), nnz, cols) == nullptr;
    Programs programs;
    const int repeats = guarded ? 2 : 1;  // the second time, a generated program is found
    for (int repeat = 0; repeat < repeats; ++repeat) {
        const char* problem = nullptr;
        std::vector<double> expected, size;
        if (which == 0 || which == 2) {
            ForwardProduct f(c, {n, channels, height, width}, vx, out, row_ptr.get(), col.get(), nnz, &programs,
                             threads);
            fill(x, seed + 2);
            fill(y, seed + 3);
            const Stored stored_x(x, element, guarded, at_end), stored_y(y, element, guarded, at_end);
            f.product.element = element;
            f.product.source.data = stored_x.get();
            f.product.values = values.get();
            f.product.norm = with_norm > 127 ? &norm : nullptr;
            const bool with_bias = seed % 2;
            Moments moments{taken_mean.get(), taken_variance.get()};
            if (which == 0) {
                f.product.bias = with_bias ? bias.get() : nullptr;
                f.product.result = with_result > 127 ? &result : nullptr;
                f.product.dest = vy;
                f.product.dest.data = stored_y.get();
                f.product.moments = f.product.result == nullptr ? &moments : nullptr;
                problem = kernels.gather_product(f.product);
            } else {
                f.product.grad = vy;
                f.product.grad.data = stored_y.get();
                f.product.value_grad = value_grad.get();
                f.product.row_sums = with_bias ? row_sums.get() : nullptr;
                problem = kernels.sampled_product(f.product);
            }
            if ((problem == nullptr) != well_formed) fail("a product judges a pattern other than validate_rows");
            stored_y.finish();
            if (problem != nullptr || (f.product.norm && is_odd)) continue;
            expected.assign(size_t(which ? nnz : y.size()), 0);
            size.assign(expected.size(), 0);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t b = 0; b < n; ++b)
                    for (int64_t oy = 0; oy < out[0]; ++oy)
                        for (int64_t ox = 0; ox < out[1]; ++ox) {
                            const size_t place = size_t(&at(vy, b, r, oy, ox) - y.get());
                            if (which == 0 && with_bias) expected[place] = bias[r];
                            for (int32_t j = row_ptr[r]; j < row_ptr[r + 1]; ++j) {
                                const int64_t tap = col[j] % taps;
                                const int64_t channel = r / c.out_per_group() * c.weight[1] + col[j] / taps;
                                const int64_t sy = oy * c.stride[0] + tap / c.weight[3] * c.dilation[0] - c.padding[0];
                                const int64_t sx = ox * c.stride[1] + tap % c.weight[3] * c.dilation[1] - c.padding[1];
                                if (sy < 0 || sy >= height || sx < 0 || sx >= width) continue;
                                double s = at(vx, b, channel, sy, sx);
                                if (f.product.norm)
                                    s = activated(norm.activation,
                                                  (s - mean[channel]) * scale[channel] + offset[channel]);
                                // What goes into a product through a norm is rounded as if it had been stored.
                                const double rounding = f.product.norm && element != Element::kFloat ? 40 : 0;
                                const double term = s * (which ? at(vy, b, r, oy, ox) : values[j]);
                                expected[which ? size_t(j) : place] += term;
                                size[which ? size_t(j) : place] += (1 + rounding) * std::abs(term);
                            }
                        }
            if (f.product.result != nullptr)
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t b = 0; b < n; ++b)
                        for (int64_t oy = 0; oy < out[0]; ++oy)
                            for (int64_t ox = 0; ox < out[1]; ++ox) {
                                const size_t place = size_t(&at(vy, b, r, oy, ox) - y.get());
                                const double added = result.residual ? residual[int64_t(place)] : 0;
                                expected[place] =
                                    activated(result.activation, (expected[place] - result_mean[r]) * result_scale[r] +
                                                                     result_offset[r] + added);
                                // Scales are 2 at most, slopes too; a sum is rounded as if it had been stored.
                                size[place] = (element == Element::kFloat ? 4 : 160) * (1 + size[place]);
                            }
            compare(which ? value_grad.get() : y.get(), expected, size, "a product differs from plain loops",
                    which ? Element::kFloat : element);
            if (moments.measured && y.size() > 0) check_moments(vy, rows, n, out, taken_mean, taken_variance);
            if (f.product.row_sums == nullptr) continue;
            expected.assign(size_t(rows), 0);
            size.assign(size_t(rows), 0);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t b = 0; b < n; ++b)
                    for (int64_t oy = 0; oy < out[0]; ++oy)
                        for (int64_t ox = 0; ox < out[1]; ++ox) {
                            expected[size_t(r)] += at(vy, b, r, oy, ox);
                            size[size_t(r)] += std::abs(at(vy, b, r, oy, ox));
                        }
            compare(row_sums.get(), expected, size, "sums of rows differ from plain loops");
        } else {
            InputGradProduct g(c, {n, channels, height, width}, vy, out, vx, t_row_ptr.get(), t_col.get(), perm.get(),
                               values.get(), nnz, &programs, threads);
            fill(y, seed + 3);
            const Stored stored_x(x, element, guarded, at_end), stored_y(y, element, guarded, at_end);
            g.product.element = element;
            g.product.source.data = stored_y.get();
            g.product.dest.data = stored_x.get();
            problem = kernels.gather_product(g.product);
            stored_x.finish();
            if (problem != nullptr && !spoilt) fail("an input gradient refuses a well-formed pattern");
            if (problem != nullptr || spoilt) continue;
            expected.assign(size_t(x.size()), 0);
            size.assign(expected.size(), 0);
            for (int64_t r = 0; r < rows; ++r)
                for (int32_t j = row_ptr[r]; j < row_ptr[r + 1]; ++j) {
                    const int64_t tap = col[j] % taps;
                    const int64_t channel = r / c.out_per_group() * c.weight[1] + col[j] / taps;
                    for (int64_t b = 0; b < n; ++b)
                        for (int64_t oy = 0; oy < out[0]; ++oy)
                            for (int64_t ox = 0; ox < out[1]; ++ox) {
                                const int64_t sy = oy * c.stride[0] + tap / c.weight[3] * c.dilation[0] - c.padding[0];
                                const int64_t sx = ox * c.stride[1] + tap % c.weight[3] * c.dilation[1] - c.padding[1];
                                if (sy < 0 || sy >= height || sx < 0 || sx >= width) continue;
                                const size_t place = size_t(&at(vx, b, channel, sy, sx) - x.get());
                                const double term = double(values[j]) * at(vy, b, r, oy, ox);
                                expected[place] += term;
                                size[place] += std::abs(term);
                            }
                }
            compare(x.get(), expected, size, "a product differs from plain loops", element);
        }
    }
}

// A depthwise convolution with the norms on both sides of it: to the last bit what the kernels do one after another.
void fuzz_norm_depthwise(Bytes& in, const Kernels& kernels, bool guarded) {
    Convolution c{};
    const int64_t channels = c.groups = c.weight[0] = in.number(2, 12);
    c.weight[1] = 1;
    for (int i = 0; i < 2; ++i) {
        c.weight[size_t(2 + i)] = in.number(1, 5);
        c.stride[size_t(i)] = in.number(1, 3);
        c.padding[size_t(i)] = in.number(0, 4);
        c.dilation[size_t(i)] = in.number(1, 3);
    }
    check(c);
    const int64_t n = in.number(1, 40), height = in.number(1, 16), width = in.number(1, 12);
    product_of({n, height, width});
    Two out;
    for (int i = 0; i < 2; ++i) {
        const int64_t extent = (i ? width : height) + 2 * c.padding[size_t(i)];
        const int64_t reach = c.dilation[size_t(i)] * (c.weight[size_t(2 + i)] - 1) + 1;
        if (extent < reach) throw TooLarge();
        out[size_t(i)] = (extent - reach) / c.stride[size_t(i)] + 1;
    }
    const int64_t taps = c.weight[2] * c.weight[3], t_rows = product_of({c.stride[0], c.stride[1], channels});
    const int64_t x_count = product_of({n, channels, height, width}),
                  y_count = product_of({n, channels, out[0], out[1]});
    const uint8_t density = in.byte();
    const uint32_t seed = in.word();
    std::minstd_rand random(seed + 1);
    Buffer<uint8_t> mask(channels * taps, guarded);
    Floats weight(channels * taps, guarded);
    fill(weight, seed);
    for (int64_t i = 0; i < mask.size(); ++i) mask[i] = random() % 256 <= density;
    const int threads = int(in.small(1, 3));
    const int64_t nnz = count_true(mask.get(), mask.size(), threads);
    Ints row_ptr(channels + 1, guarded), col(nnz, guarded), t_row_ptr(t_rows + 1, guarded), t_col(nnz, guarded),
        perm(nnz, guarded);
    Floats values(nnz, guarded);
    build_rows(weight.get(), mask.get(), channels, taps, row_ptr.get(), col.get(), values.get(), threads);
    build_transpose(pattern_shape(c), row_ptr.get(), col.get(), t_row_ptr.get(), t_col.get(), perm.get(), threads);

    const Element element = element_of(int(in.small(0, 1)));
    Floats x(x_count, guarded), grad(y_count, guarded), activated_x(x_count, false), y(y_count, false),
        together_y(y_count, guarded), grad_y(y_count, false), grad_x(x_count, false),
        together_grad_x(x_count, guarded);
    fill(x, seed + 2), fill(grad, seed + 3);
    const Stored sx(x, element, guarded), sgrad(grad, element, guarded), sactivated(activated_x, element),
        sy(y, element), sy2(together_y, element, guarded), sgy(grad_y, element), sgx(grad_x, element),
        sgx2(together_grad_x, element, guarded);
    Floats numbers(16 * channels, false), value_grad(nnz, guarded), together_value_grad(nnz, guarded);
    fill(numbers, seed + 4);
    const auto part = [&](int i) { return numbers.get() + i * channels; };
    const auto norm = [&](const Stored& of, int64_t size, int first, int activation) {
        Norm q{};
        q.channels = channels;
        q.size = size;
        q.element = element;
        q.activation = activation_of(activation);
        q.x = of.get();
        q.weight = part(first), q.bias = part(first + 1), q.mean = part(first + 2), q.variance = part(first + 3);
        q.rstd = part(first + 4), q.grad_weight = part(first + 5), q.grad_bias = part(first + 6);
        q.eps = 1e-3f;
        q.measure = q.training = true;
        q.threads = threads;
        return q;
    };
    const Four size{n, channels, height, width};
    const auto view_of = [&](const Stored& of, int64_t h, int64_t w) {
        return layout(of.get(), n, channels, h, w, true);
    };
    std::snprintf(described, sizeof described,
                  "%s depthwise between norms, type %d: weight %ld %ld %ld, stride %ld %ld, padding %ld %ld, "
                  "dilation %ld %ld, input %ld %ld %ld, output %ld %ld, nnz %ld, threads %d",
                  kernels.name, int(element), long(channels), long(c.weight[2]), long(c.weight[3]), long(c.stride[0]),
                  long(c.stride[1]), long(c.padding[0]), long(c.padding[1]), long(c.dilation[0]), long(c.dilation[1]),
                  long(n), long(height), long(width), long(out[0]), long(out[1]), long(nnz), threads);

    // One after another.
    const int first_activation = in.byte() % 7, second_activation = in.byte() % 7;
    Norm inner = norm(sx, n * height * width, 0, first_activation),
         outer = norm(sy, n * out[0] * out[1], 7, second_activation);
    inner.y = sactivated.get();
    kernels.norm_forward(inner);
    ForwardProduct f(c, size, view_of(sactivated, height, width), out, row_ptr.get(), col.get(), nnz, nullptr,
                     threads);
    f.product.element = element;
    f.product.values = values.get();
    f.product.dest = view_of(sy, out[0], out[1]);
    if (kernels.gather_product(f.product) != nullptr) fail("a built pattern is refused");
    kernels.norm_forward(outer);
    outer.grad = sgrad.get(), outer.grad_x = sgy.get();
    kernels.norm_backward(outer);
    f.product.grad = view_of(sgy, out[0], out[1]);
    f.product.value_grad = value_grad.get();
    if (kernels.sampled_product(f.product) != nullptr) fail("a built pattern is refused");
    InputGradProduct g(c, size, view_of(sgy, out[0], out[1]), out, view_of(sgx, height, width), t_row_ptr.get(),
                       t_col.get(), perm.get(), values.get(), nnz, nullptr, threads);
    g.product.element = element;
    if (kernels.gather_product(g.product) != nullptr) fail("a built pattern is refused");
    inner.grad = inner.grad_x = sgx.get();
    kernels.norm_backward(inner);
    const std::vector<float> grads(part(0), part(14));

    // Together.
    ForwardProduct forward(c, size, view_of(sx, height, width), out, row_ptr.get(), col.get(), nnz, nullptr, threads);
    forward.product.element = element;
    forward.product.values = values.get();
    forward.product.dest = view_of(sy2, out[0], out[1]);
    outer.x = sy2.get();
    if (kernels.norm_depthwise_forward({forward.product, {}, inner, outer}) != nullptr)
        fail("a built pattern is refused");
    InputGradProduct back(c, size, view_of(sgrad, out[0], out[1]), out, view_of(sgx2, height, width), t_row_ptr.get(),
                          t_col.get(), perm.get(), values.get(), nnz, nullptr, threads);
    back.product.element = element;
    forward.product.value_grad = together_value_grad.get();
    if (kernels.norm_depthwise_backward({back.product, forward.product, inner, outer}) != nullptr)
        fail("a built pattern is refused");
    for (const Stored* stored : {&sy, &sy2, &sgx, &sgx2}) stored->finish();
    const auto same = [](const float* a, const float* b, int64_t count) {
        for (int64_t i = 0; i < count; ++i)
            if (a[i] != b[i] && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
        return true;
    };
    if (!same(y.get(), together_y.get(), y_count) || !same(grad_x.get(), together_grad_x.get(), x_count) ||
        !same(value_grad.get(), together_value_grad.get(), nnz) || !same(grads.data(), part(0), 14 * channels))
        fail("a depthwise convolution between norms differs from one after another");
}

}  // namespace fuzz
}  // namespace sparse_ft
