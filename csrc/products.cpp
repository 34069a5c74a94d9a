// Sparse layers at the Python edge: torch's tensors in, new ones out.
//
// Each function gives None where the core does not take its arguments as they are (another device, type, layout or
// size), and then has done nothing: the caller finds out what is wrong, or brings them into shape.
#include <pybind11/pybind11.h>

#include <array>
#include <optional>
#include <vector>

#include "convolution.h"
#include "dispatch.h"
#include "edge.h"
#include "layer.h"
#include "programs.h"

namespace py = pybind11;

namespace sparse_ft {
namespace {

// A norm that a source goes through on its way in. As Python holds it: mean, 1 / standard deviation, weight and bias
// (which may be None), and the activation; or None.
class Entrance {
  public:
    Entrance(py::handle arguments, int64_t channels) {
        if (arguments.is_none()) return;
        const auto given = py::reinterpret_borrow<py::tuple>(arguments);
        const Tensor mean(given[0]), rstd(given[1]), weight(given[2]), bias(given[3]);
        const int activation = given[4].cast<int>();
        fits = mean.is_floats(channels) && rstd.is_floats(channels) &&
               (!weight.given() || weight.is_floats(channels)) && (!bias.given() || bias.is_floats(channels)) &&
               is_activation(activation);
        if (!fits) return;
        scale.assign(rstd.data<float>(), rstd.data<float>() + channels);
        if (weight.given())
            for (size_t c = 0; c < scale.size(); ++c) scale[c] *= weight.data<float>()[c];
        offset.assign(size_t(channels), 0.0f);
        if (bias.given()) std::copy_n(bias.data<float>(), channels, offset.begin());
        norm = {mean.data<float>(), scale.data(), offset.data(), activation_of(activation)};
        exists = true;
    }
    Entrance(const Entrance&) = delete;  // the norm points into it
    const SourceNorm* get() const { return exists ? &norm : nullptr; }
    bool fits = true;

  private:
    std::vector<float> scale, offset;
    SourceNorm norm{};
    bool exists = false;
};

// What results go through on their way out. As Python holds it: mean, variance, weight, bias, eps, residual (all of
// which may be None; without a variance there is no norm) and the activation; or None.
class Exit {
  public:
    Exit(py::handle arguments, Element element, const Four& sizes) {
        if (arguments.is_none()) return;
        const auto given = py::reinterpret_borrow<py::tuple>(arguments);
        const Tensor mean(given[0]), variance(given[1]), weight(given[2]), bias(given[3]), residual(given[5]);
        const int activation = given[6].cast<int>();
        const int64_t rows = sizes[1];
        fits = is_activation(activation);
        for (const Tensor* t : {&mean, &variance, &weight, &bias}) fits = fits && (!t->given() || t->is_floats(rows));
        fits = fits && (!residual.given() || is_image_of(residual, element, sizes.data()));
        if (!fits) return;
        const float eps = given[4].cast<float>();
        scale.assign(size_t(rows), 1.0f);
        for (size_t r = 0; variance.given() && r < scale.size(); ++r)
            scale[r] = reciprocal_deviation(variance.data<float>()[r], eps) *
                       (weight.given() ? weight.data<float>()[r] : 1.0f);
        if (!mean.given() || !bias.given()) zeros.assign(size_t(rows), 0.0f);
        norm = {mean.given() ? mean.data<float>() : zeros.data(), scale.data(),
                bias.given() ? bias.data<float>() : zeros.data(), residual.data<const void>(),
                activation_of(activation)};
        exists = true;
    }
    Exit(const Exit&) = delete;  // the norm points into it
    const ResultNorm* get() const { return exists ? &norm : nullptr; }
    bool fits = true;

  private:
    std::vector<float> scale, zeros;
    ResultNorm norm{};
    bool exists = false;
};

bool is_empty(const int64_t* sizes) { return sizes[0] == 0 || sizes[1] == 0 || sizes[2] == 0 || sizes[3] == 0; }

// The caller's tensor `out`, if it fits, or without one what `make` gives.
template <class Fits, class Make>
std::optional<NewTensor> given_or_new(py::handle out, Fits fits, Make make) {
    if (out.is_none()) return make();
    const Tensor given(out);
    if (!fits(given)) return std::nullopt;
    return NewTensor{py::reinterpret_borrow<py::object>(out), given.data<void>()};
}

std::optional<NewTensor> image(py::handle out, Element element, const int64_t* sizes) {
    return given_or_new(
        out, [&](const Tensor& given) { return is_image_of(given, element, sizes); },
        [&] { return new_batch_last(element, sizes); });
}

std::optional<NewTensor> floats(py::handle out, int64_t count) {
    return given_or_new(
        out, [&](const Tensor& given) { return given.is_floats(count); }, [&] { return new_floats(count); });
}

// To `measure`, (y, mean, biased variance): the last two None where the kernel does not take them on the way.
py::object conv2d(const Convolution& c, py::handle x_, py::handle values, py::handle bias, py::handle pattern,
                  Programs* programs, int threads, py::handle norm, py::handle result, bool measure, py::handle out) {
    const Tensor x(x_);
    const Weight weight(c, pattern, values, bias);
    if (!is_image(x) || !weight.fits || !weight.valued) return py::none();
    const std::optional<Four> sizes = output_sizes(c, x.sizes());
    if (!sizes || is_empty(sizes->data())) return py::none();
    const Entrance entrance(norm, x.size(1));
    const Exit exit(result, x.element(), *sizes);
    if (!entrance.fits || !exit.fits) return py::none();
    const std::optional<NewTensor> y = image(out, x.element(), sizes->data());
    if (!y) return py::none();

    const bool flat = is_flat(c);
    const Place from = batch_last(x.sizes(), flat), to = batch_last(sizes->data(), flat);
    ForwardProduct f(c, from.size, view(x.data<void>(), from), to.positions(), weight.row_ptr(), weight.col(),
                     weight.nnz, programs, threads_of(weight, from, to, threads));
    f.product.element = x.element();
    f.product.norm = entrance.get();
    f.product.result = exit.get();
    f.product.values = weight.values;
    f.product.bias = weight.bias;
    f.product.dest = view(y->data, to);
    if (!measure) {
        run(active_kernels().gather_product, f.product);
        return y->object;
    }
    const NewTensor mean = new_floats(c.weight[0]), variance = new_floats(c.weight[0]);
    Moments moments{static_cast<float*>(mean.data), static_cast<float*>(variance.data)};
    f.product.moments = &moments;
    run(active_kernels().gather_product, f.product);
    if (!moments.measured) return py::make_tuple(y->object, py::none(), py::none());
    return py::make_tuple(y->object, mean.object, variance.object);
}

// The gradient of a convolution's input, of `sizes`.
void input_grad(const Convolution& c, const Tensor& grad, const Weight& weight, const Four& sizes, void* grad_x,
                Programs* programs, int threads) {
    const bool flat = is_flat(c);
    const Place from = batch_last(grad.sizes(), flat), to = batch_last(sizes.data(), flat);
    InputGradProduct g(c, to.size, view(grad.data<void>(), from), from.positions(), view(grad_x, to),
                       weight.t_row_ptr(), weight.t_col(), weight.perm(), weight.values, weight.nnz, programs,
                       threads_of(weight, to, from, threads));
    g.product.element = grad.element();
    run(active_kernels().gather_product, g.product);
}

void weight_grad(const Convolution& c, const Tensor& grad, const Tensor& x, const Weight& weight,
                 const SourceNorm* norm, void* value_grad, Programs* programs, int threads) {
    const bool flat = is_flat(c);
    const Place from = batch_last(x.sizes(), flat), to = batch_last(grad.sizes(), flat);
    ForwardProduct f(c, from.size, view(x.data<void>(), from), to.positions(), weight.row_ptr(), weight.col(),
                     weight.nnz, programs, threads_of(weight, from, to, threads));
    f.product.element = x.element();
    f.product.norm = norm;
    f.product.grad = view(grad.data<void>(), to);
    f.product.value_grad = static_cast<float*>(value_grad);
    run(active_kernels().sampled_product, f.product);
}

// Whether `x` and `grad` are a convolution's input and its output's gradient.
bool are_sides(const Convolution& c, const Tensor& x, const Tensor& grad) {
    if (!is_image(x) || x.count() == 0 || grad.count() == 0) return false;
    const std::optional<Four> sizes = output_sizes(c, x.sizes());
    return sizes && is_image_of(grad, x.element(), sizes->data());
}

py::object conv2d_input_grad(const Convolution& c, py::handle grad_, py::handle values, py::handle pattern,
                             Programs* programs, int threads, const std::vector<int64_t>& input_sizes,
                             py::handle out) {
    if (input_sizes.size() != 4) return py::none();
    const Four sizes{input_sizes[0], input_sizes[1], input_sizes[2], input_sizes[3]};
    const Tensor grad(grad_);
    const Weight weight(c, pattern, values, py::none());
    const std::optional<Four> expected = output_sizes(c, sizes.data());
    if (!is_image(grad) || !weight.fits || !weight.valued || !expected || is_empty(sizes.data()) ||
        !std::equal(expected->begin(), expected->end(), grad.sizes()))
        return py::none();
    const std::optional<NewTensor> grad_x = image(out, grad.element(), sizes.data());
    if (!grad_x) return py::none();
    input_grad(c, grad, weight, sizes, grad_x->data, programs, threads);
    return grad_x->object;
}

py::object conv2d_weight_grad(const Convolution& c, py::handle grad_, py::handle x_, py::handle pattern,
                              Programs* programs, int threads, py::handle norm, py::handle out) {
    const Tensor grad(grad_), x(x_);
    const Weight weight(c, pattern, py::none(), py::none());
    if (!are_sides(c, x, grad) || !weight.fits) return py::none();
    const Entrance entrance(norm, x.size(1));
    if (!entrance.fits) return py::none();
    const std::optional<NewTensor> value_grad = floats(out, weight.nnz);
    if (!value_grad) return py::none();
    weight_grad(c, grad, x, weight, entrance.get(), value_grad->data, programs, threads);
    return value_grad->object;
}

// Both, the second with the sizes of `values`.
py::object conv2d_backward(const Convolution& c, py::handle grad_, py::handle x_, py::handle values_,
                           py::handle pattern, Programs* programs, int threads, py::handle norm) {
    const Tensor grad(grad_), x(x_), values(values_);
    const Weight weight(c, pattern, values_, py::none());
    if (!are_sides(c, x, grad) || !weight.fits || !weight.valued) return py::none();
    const Entrance entrance(norm, x.size(1));
    if (!entrance.fits) return py::none();
    const Four sizes{x.size(0), x.size(1), x.size(2), x.size(3)};
    const NewTensor grad_x = new_batch_last(x.element(), x.sizes());
    const NewTensor value_grad =
        new_contiguous(Element::kFloat, {values.sizes(), values.sizes() + values.dimensions()});
    input_grad(c, grad, weight, sizes, grad_x.data, programs, threads);
    weight_grad(c, grad, x, weight, entrance.get(), value_grad.data, programs, threads);
    return py::make_tuple(grad_x.object, value_grad.object);
}

// ---- linear layers: token-major activations (..., features) ----------------------------------------

bool is_tokens(const Tensor& x, int64_t features) {
    return x.is_activation() && x.is_contiguous() && x.dimensions() > 0 && x.size(x.dimensions() - 1) == features;
}

int64_t tokens(const Tensor& x) {
    int64_t count = 1;
    for (int i = 0; i + 1 < x.dimensions(); ++i) count *= x.size(i);
    return count;
}

// The same dimensions with another last one.
NewTensor tokens_like(const Tensor& x, int64_t features) {
    std::vector<int64_t> sizes(x.sizes(), x.sizes() + x.dimensions());
    sizes.back() = features;
    return new_contiguous(x.element(), sizes);
}

py::object linear(const Convolution& c, py::handle x_, py::handle values, py::handle bias, py::handle pattern,
                  Programs* programs, int threads) {
    const Tensor x(x_);
    const Weight weight(c, pattern, values, bias);
    const int64_t in = c.weight[1], out = c.weight[0];
    if (!is_tokens(x, in) || tokens(x) == 0 || out == 0 || !weight.fits || !weight.valued) return py::none();
    const Place from = token_major(tokens(x), in), to = token_major(tokens(x), out);
    const NewTensor y = tokens_like(x, out);
    ForwardProduct f(c, from.size, view(x.data<void>(), from), to.positions(), weight.row_ptr(), weight.col(),
                     weight.nnz, programs, threads_of(weight, from, to, threads));
    f.product.element = x.element();
    f.product.values = weight.values;
    f.product.bias = weight.bias;
    f.product.dest = view(y.data, to);
    run(active_kernels().gather_product, f.product);
    return y.object;
}

py::object linear_input_grad(const Convolution& c, py::handle grad_, py::handle values, py::handle pattern,
                             Programs* programs, int threads) {
    const Tensor grad(grad_);
    const Weight weight(c, pattern, values, py::none());
    const int64_t in = c.weight[1], out = c.weight[0];
    if (!is_tokens(grad, out) || tokens(grad) == 0 || in == 0 || !weight.fits || !weight.valued) return py::none();
    const Place from = token_major(tokens(grad), out), to = token_major(tokens(grad), in);
    const NewTensor grad_x = tokens_like(grad, in);
    InputGradProduct g(c, to.size, view(grad.data<void>(), from), from.positions(), view(grad_x.data, to),
                       weight.t_row_ptr(), weight.t_col(), weight.perm(), weight.values, weight.nnz, programs,
                       threads_of(weight, to, from, threads));
    g.product.element = grad.element();
    run(active_kernels().gather_product, g.product);
    return grad_x.object;
}

// With `of_bias`, (weight's gradient, sum of the gradient over the tokens).
py::object linear_weight_grad(const Convolution& c, py::handle grad_, py::handle x_, py::handle pattern,
                              Programs* programs, int threads, bool of_bias) {
    const Tensor grad(grad_), x(x_);
    const Weight weight(c, pattern, py::none(), py::none());
    const int64_t in = c.weight[1], out = c.weight[0];
    if (!is_tokens(x, in) || !is_tokens(grad, out) || x.element() != grad.element() || !weight.fits ||
        x.count() == 0 || grad.count() == 0 || x.dimensions() != grad.dimensions() ||
        !std::equal(x.sizes(), x.sizes() + x.dimensions() - 1, grad.sizes()))
        return py::none();
    const Place from = token_major(tokens(x), in), to = token_major(tokens(x), out);
    ForwardProduct f(c, from.size, view(x.data<void>(), from), to.positions(), weight.row_ptr(), weight.col(),
                     weight.nnz, programs, threads_of(weight, from, to, threads));
    const NewTensor value_grad = new_floats(weight.nnz);
    f.product.element = x.element();
    f.product.grad = view(grad.data<void>(), to);
    f.product.value_grad = static_cast<float*>(value_grad.data);
    if (!of_bias) {
        run(active_kernels().sampled_product, f.product);
        return value_grad.object;
    }
    const NewTensor bias_grad = new_floats(out);
    f.product.row_sums = static_cast<float*>(bias_grad.data);
    run(active_kernels().sampled_product, f.product);
    return py::make_tuple(value_grad.object, bias_grad.object);
}

}  // namespace

void bind_products(py::module_& m) {
    m.def("conv2d", &conv2d);
    m.def("conv2d_input_grad", &conv2d_input_grad);
    m.def("conv2d_weight_grad", &conv2d_weight_grad);
    m.def("conv2d_backward", &conv2d_backward);
    m.def("linear", &linear);
    m.def("linear_input_grad", &linear_input_grad);
    m.def("linear_weight_grad", &linear_weight_grad);
}

}  // namespace sparse_ft
