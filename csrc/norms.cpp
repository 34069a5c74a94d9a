// Batch norms at the Python edge: torch's tensors in, new ones out, or None where the core does not take the arguments
// as they are (see products.cpp).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "dispatch.h"
#include "edge.h"
#include "layer.h"

namespace py = pybind11;

namespace sparse_ft {
namespace {

// A norm's activations and parameters, as far as they are given.
class Arguments {
  public:
    Arguments(py::handle x_, py::handle weight, py::handle bias, py::handle mean, py::handle rstd_or_variance,
              int activation, int most_threads)
        : x(x_) {
        fits = is_image(x) && x.count() > 0 && is_activation(activation);
        if (!fits) return;
        constexpr int64_t kOfChannel = 2000;  // operations, in the time of sums that wait for one another
        norm.channels = x.size(1);
        norm.size = x.count() / x.size(1);
        norm.element = x.element();
        norm.activation = activation_of(activation);
        norm.x = x.data<const void>();
        norm.threads = threads_for(kOfChannel * norm.channels, 2 * x.count(), most_threads);
        norm.weight = channels(weight);
        norm.bias = channels(bias);
        this->mean = channels(mean);
        last = channels(rstd_or_variance);
    }
    // One float a channel, or null for None.
    float* channels(py::handle object) {
        const Tensor tensor(object);
        if (!tensor.given()) return nullptr;
        fits = fits && tensor.is_floats(norm.channels);
        return tensor.data<float>();
    }
    // An activation that lies as x does, or null for None.
    void* like_x(py::handle object) {
        const Tensor tensor(object);
        if (!tensor.given()) return nullptr;
        fits = fits && is_image_of(tensor, norm.element, x.sizes());
        return tensor.data<void>();
    }

    Tensor x;
    bool fits;
    Norm norm{};
    float *mean = nullptr, *last = nullptr;
};

// Whether the core takes these as they are: a batch-last activation of more than one value a channel, and a norm's
// parameters and statistics, which may be None.
bool takes_norm(py::handle x, py::handle weight, py::handle bias, py::handle mean) {
    const Arguments given(x, weight, bias, mean, py::none(), 0, 1);
    return given.fits && given.norm.size > 1;
}

// (y, mean, 1 / standard deviation, biased variance); measures the statistics unless they are given.
py::object batch_norm(py::handle x, py::handle weight, py::handle bias, py::handle mean_, py::handle variance_,
                      float eps, py::handle residual, int activation, int threads) {
    Arguments given(x, weight, bias, mean_, variance_, activation, threads);
    if (!given.fits) return py::none();
    Norm& q = given.norm;
    q.residual = given.like_x(residual);
    q.measure = given.mean == nullptr;
    if (!given.fits || q.measure != (given.last == nullptr)) return py::none();
    const NewTensor y = new_batch_last(q.element, given.x.sizes());
    const NewTensor mean = new_floats(q.channels), rstd = new_floats(q.channels), variance = new_floats(q.channels);
    q.mean = static_cast<float*>(mean.data);
    q.rstd = static_cast<float*>(rstd.data);
    q.variance = static_cast<float*>(variance.data);
    if (!q.measure) {  // results of their own
        std::copy_n(given.mean, q.channels, q.mean);
        std::copy_n(given.last, q.channels, q.variance);
    }
    q.eps = eps;
    q.y = y.data;
    run(active_kernels().norm_forward, q);
    return py::make_tuple(y.object, mean.object, rstd.object, variance.object);
}

// (mean, biased variance)
py::object batch_norm_statistics(py::handle x, int threads) {
    const py::none none;
    Arguments given(x, none, none, none, none, 0, threads);
    if (!given.fits) return none;
    Norm& q = given.norm;
    const NewTensor mean = new_floats(q.channels), rstd = new_floats(q.channels), variance = new_floats(q.channels);
    q.mean = static_cast<float*>(mean.data);
    q.rstd = static_cast<float*>(rstd.data);
    q.variance = static_cast<float*>(variance.data);
    q.measure = true;
    run(active_kernels().norm_forward, q);
    return py::make_tuple(mean.object, variance.object);
}

// The gradients of x, weight and bias, and what comes in before the activation: an empty one for a norm that nothing
// was added to.
py::object batch_norm_backward(py::handle grad, py::handle x, py::handle weight, py::handle bias, py::handle mean,
                               py::handle rstd, py::handle residual, py::handle output, int activation, bool training,
                               int threads) {
    Arguments given(x, weight, bias, mean, rstd, activation, threads);
    if (!given.fits) return py::none();
    Norm& q = given.norm;
    q.grad = given.like_x(grad);
    q.residual = given.like_x(residual);
    q.output = given.like_x(output);
    q.mean = given.mean;
    q.rstd = given.last;
    if (!given.fits || q.grad == nullptr || q.mean == nullptr || q.rstd == nullptr) return py::none();
    q.training = training;
    const bool added = q.residual != nullptr || q.output != nullptr;
    const NewTensor grad_x = new_batch_last(q.element, given.x.sizes());
    const NewTensor grad_weight = new_floats(q.channels), grad_bias = new_floats(q.channels);
    constexpr int64_t kNothing[4]{};
    const NewTensor grad_residual = new_batch_last(q.element, added ? given.x.sizes() : kNothing);
    q.grad_x = grad_x.data;
    q.grad_residual = added ? grad_residual.data : nullptr;
    q.grad_weight = static_cast<float*>(grad_weight.data);
    q.grad_bias = static_cast<float*>(grad_bias.data);
    run(active_kernels().norm_backward, q);
    return py::make_tuple(grad_x.object, grad_weight.object, grad_bias.object, grad_residual.object);
}

// ---- norms beside something else -------------------------------------------------------------------

// Of a norm as Python holds it: weight and bias (which may be None), mean, 1 / standard deviation, activation.
class Beside {
  public:
    Beside(py::handle x, const py::tuple& norm, int threads)
        : arguments(x, norm[0], norm[1], norm[2], norm[3], norm[4].cast<int>(), threads) {
        fits = arguments.fits && arguments.mean != nullptr && arguments.last != nullptr;
        arguments.norm.mean = arguments.mean;
        arguments.norm.rstd = arguments.last;
    }
    // Memory for the gradients of weight and bias.
    void take_gradients() {
        grad_weight = new_floats(arguments.norm.channels);
        grad_bias = new_floats(arguments.norm.channels);
        arguments.norm.grad_weight = static_cast<float*>(grad_weight.data);
        arguments.norm.grad_bias = static_cast<float*>(grad_bias.data);
    }
    Arguments arguments;
    bool fits;
    NewTensor grad_weight, grad_bias;
};

// Whether the axes are of x, and `chosen` lies as what comes of pooling it.
bool is_pooled(const Tensor& x, const PoolAxis& rows, const PoolAxis& columns, const Tensor& chosen) {
    const Windows &h = rows.windows, &w = columns.windows;
    return h.size == x.size(2) && w.size == x.size(3) && h.count > 0 && w.count > 0 && chosen.is_bytes() &&
           chosen.is_batch_last() && chosen.size(0) == x.size(0) && chosen.size(1) == x.size(1) &&
           chosen.size(2) == h.count && chosen.size(3) == w.count;
}

bool is_depthwise(const Convolution& c) { return c.groups == c.weight[0] && c.weight[1] == 1; }

// (y, its mean and biased variance) of the convolution of x's norm.
py::object norm_depthwise(const Convolution& c, py::handle x, const py::tuple& inner, py::handle values,
                          py::handle bias, py::handle pattern, int threads) {
    const Beside before(x, inner, threads);
    const Weight weight(c, pattern, values, bias);
    if (!before.fits || !weight.fits || !weight.valued || !is_depthwise(c)) return py::none();
    const Tensor& source = before.arguments.x;
    const std::optional<Four> sizes = output_sizes(c, source.sizes());
    if (!sizes) return py::none();
    const Place from = batch_last(source.sizes(), false), to = batch_last(sizes->data(), false);
    const NewTensor y = new_batch_last(source.element(), sizes->data());
    const NewTensor mean = new_floats(c.groups), variance = new_floats(c.groups);
    ForwardProduct f(c, from.size, view(source.data<void>(), from), to.positions(), weight.row_ptr(), weight.col(),
                     weight.nnz, nullptr, threads_of(weight, from, to, threads));
    f.product.element = source.element();
    f.product.values = weight.values;
    f.product.bias = weight.bias;
    f.product.dest = view(y.data, to);
    NormDepthwise block{f.product, {}, before.arguments.norm, {}};
    block.outer.channels = c.groups;
    block.outer.size = to.size[0] * to.size[2] * to.size[3];
    block.outer.mean = static_cast<float*>(mean.data);
    block.outer.variance = static_cast<float*>(variance.data);
    run(active_kernels().norm_depthwise_forward, block);
    return py::make_tuple(y.object, mean.object, variance.object);
}

// The gradients of x, the inner norm's weight and bias, the values, the outer norm's weight and bias.
py::object norm_depthwise_backward(const Convolution& c, py::handle grad_, py::handle y, const py::tuple& outer,
                                   py::handle x, const py::tuple& inner, bool training, py::handle values,
                                   py::handle pattern, int threads) {
    Beside before(x, inner, threads), after(y, outer, threads);
    const Weight weight(c, pattern, values, py::none());
    if (!before.fits || !after.fits || !weight.fits || !weight.valued || !is_depthwise(c)) return py::none();
    const Tensor &source = before.arguments.x, &sink = after.arguments.x;
    const std::optional<Four> sizes = output_sizes(c, source.sizes());
    const Tensor grad(grad_);
    if (!sizes || !is_image_of(sink, source.element(), sizes->data()) ||
        !is_image_of(grad, source.element(), sizes->data()))
        return py::none();
    before.take_gradients();
    after.take_gradients();
    before.arguments.norm.training = training;
    after.arguments.norm.training = true;
    after.arguments.norm.grad = grad.data<const void>();
    const Place from = batch_last(source.sizes(), false), to = batch_last(sizes->data(), false);
    const NewTensor grad_x = new_batch_last(source.element(), source.sizes()), value_grad = new_floats(weight.nnz);
    const int used = threads_of(weight, from, to, threads);
    ForwardProduct f(c, from.size, view(source.data<void>(), from), to.positions(), weight.row_ptr(), weight.col(),
                     weight.nnz, nullptr, used);
    InputGradProduct g(c, from.size, view(nullptr, to), to.positions(), view(grad_x.data, from), weight.t_row_ptr(),
                       weight.t_col(), weight.perm(), weight.values, weight.nnz, nullptr, used);
    f.product.element = g.product.element = source.element();
    f.product.value_grad = static_cast<float*>(value_grad.data);
    const NormDepthwise block{g.product, f.product, before.arguments.norm, after.arguments.norm};
    run(active_kernels().norm_depthwise_backward, block);
    return py::make_tuple(grad_x.object, before.grad_weight.object, before.grad_bias.object, value_grad.object,
                          after.grad_weight.object, after.grad_bias.object);
}

// ---- max pooling of an activated norm --------------------------------------------------------------

// `chosen`: memory for the number of the tap that each maximum came from.
py::object norm_max_pool(py::handle x, const py::tuple& norm, const PoolAxis& rows, const PoolAxis& columns,
                         py::handle chosen_, int threads) {
    const Beside before(x, norm, threads);
    const Tensor chosen(chosen_);
    if (!before.fits || !is_pooled(before.arguments.x, rows, columns, chosen)) return py::none();
    const Norm& q = before.arguments.norm;
    const NewTensor y = new_batch_last(q.element, chosen.sizes());
    const NormPool block{q,
                         {before.arguments.x.size(0), q.channels, q.element, rows.windows, columns.windows, nullptr,
                          y.data, chosen.data<uint8_t>(), nullptr, nullptr, q.threads}};
    run(active_kernels().norm_pool_forward, block);
    return y.object;
}

// The gradients of x, weight and bias.
py::object norm_max_pool_backward(py::handle grad_, py::handle chosen_, py::handle x, const py::tuple& norm,
                                  bool training, const PoolAxis& rows, const PoolAxis& columns, int threads) {
    Beside before(x, norm, threads);
    const Tensor grad(grad_), chosen(chosen_);
    if (!before.fits || !is_pooled(before.arguments.x, rows, columns, chosen)) return py::none();
    Norm& q = before.arguments.norm;
    if (!is_image_of(grad, q.element, chosen.sizes())) return py::none();
    before.take_gradients();
    const NewTensor grad_x = new_batch_last(q.element, before.arguments.x.sizes());
    q.training = training;
    q.grad_x = grad_x.data;
    const NormPool block{q,
                         {before.arguments.x.size(0), q.channels, q.element, rows.windows, columns.windows, nullptr,
                          nullptr, chosen.data<uint8_t>(), grad.data<const void>(), nullptr, q.threads}};
    run(active_kernels().norm_pool_backward, block);
    return py::make_tuple(grad_x.object, before.grad_weight.object, before.grad_bias.object);
}

// ---- statistics ------------------------------------------------------------------------------------

py::object deviation(py::handle variance_, float eps) {
    const Tensor variance(variance_);
    if (!variance.is_floats(variance.count())) return py::none();
    const NewTensor rstd = new_floats(variance.count());
    for (int64_t c = 0; c < variance.count(); ++c)
        static_cast<float*>(rstd.data)[c] = reciprocal_deviation(variance.data<float>()[c], eps);
    return rstd.object;
}

// Moves `running` towards `measured` times `correction`, as torch.lerp: exact at both ends.
void move_towards(const Tensor& running, const Tensor& measured, float correction, float share) {
    for (int64_t c = 0; c < running.count(); ++c) {
        float& value = running.data<float>()[c];
        const float goal = measured.data<float>()[c] * correction, way = goal - value;
        value = share < 0.5f ? value + share * way : goal - way * (1 - share);
    }
}

// One more batch in a norm's running statistics; without a momentum they are averages over all. Whether it could:
// what is written must count its versions, as nothing of inference mode does.
bool update_running(py::handle batches_, py::handle running_mean_, py::handle running_variance_, py::handle mean_,
                    py::handle variance_, std::optional<double> momentum, float correction) {
    const Tensor batches(batches_), running_mean(running_mean_), running_variance(running_variance_);
    const Tensor mean(mean_), variance(variance_);
    const int64_t channels = mean.count();
    for (const Tensor* each : {&running_mean, &running_variance, &mean, &variance})
        if (!each->is_floats(channels)) return false;
    if (!batches.is_count()) return false;
    for (const py::handle& written : {batches_, running_mean_, running_variance_})
        if (!counts_versions(written)) return false;
    const int64_t number = ++*batches.data<int64_t>();
    const float share = float(momentum ? *momentum : 1.0 / double(number));
    move_towards(running_mean, mean, 1.0f, share);
    move_towards(running_variance, variance, correction, share);
    return true;
}

}  // namespace

void bind_norms(py::module_& m) {
    m.def("takes_norm", &takes_norm);
    m.def("batch_norm", &batch_norm);
    m.def("batch_norm_statistics", &batch_norm_statistics);
    m.def("batch_norm_backward", &batch_norm_backward);
    m.def("norm_depthwise", &norm_depthwise);
    m.def("norm_depthwise_backward", &norm_depthwise_backward);
    m.def("norm_max_pool", &norm_max_pool);
    m.def("norm_max_pool_backward", &norm_max_pool_backward);
    m.def("reciprocal_deviation", &deviation);
    m.def("update_running", &update_running);
}

}  // namespace sparse_ft
