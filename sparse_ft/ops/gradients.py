"""Gradients of the operators.

Each operator's Autograd kernel is a `torch.autograd.Function` that calls the operator again below autograd. The
functions at the end are what modules call.
`torch.library.register_autograd` would do the same by way of generic tree flattening, which took a third of a small
layer's forward and backward (about 0.1 of 0.3 ms).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_ft.ops import native
from sparse_ft.ops.activations import Activation
from sparse_ft.ops.calls import below_autograd, caller, plain
from sparse_ft.ops.checks import check_whole_norm
from sparse_ft.ops.layout import BATCH_LAST, is_batch_last, layout_of
from sparse_ft.ops.schema import IMPLEMENTATIONS, library


def _as(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient if gradient.dtype is dtype else gradient.to(dtype)


def _like(gradient: Tensor, values: Tensor) -> Tensor:
    return _as(gradient, values.dtype).view(values.shape)


class _Weighted(torch.autograd.Function):
    """What the linear layer and the convolution share: x, values, bias, pattern, and their geometry."""

    @staticmethod
    def forward(ctx, x, values, bias, pattern, *geometry):
        # The input is needed for the weight gradient only. A pattern is not differentiated: it need not be watched.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values)
        ctx.pattern, ctx.geometry, ctx.input_shape = pattern, geometry[:5], x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return ctx._forward_cls.compute(x, values, bias, pattern, *geometry)


class _Linear(_Weighted):
    compute = staticmethod(below_autograd("linear"))

    @staticmethod
    def backward(ctx, grad):
        x, values = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
        if needs_x:
            grad_x = linear_input_grad(grad, values, ctx.pattern, *ctx.geometry)
        if needs_values and needs_bias:
            grad_values, grad_bias = linear_weight_bias_grad(grad, x, ctx.pattern, *ctx.geometry)
            grad_values, grad_bias = _like(grad_values, values), _as(grad_bias, ctx.bias_dtype)
        elif needs_values:
            grad_values = _like(linear_weight_grad(grad, x, ctx.pattern, *ctx.geometry), values)
        elif needs_bias:
            grad_bias = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_values, grad_bias, None, None, None


class _Conv2d(_Weighted):
    compute = staticmethod(below_autograd("conv2d"))

    @staticmethod
    def backward(ctx, grad):
        x, values = ctx.saved_tensors
        grads = _conv2d_gradients(ctx, grad, x, values, ctx.input_shape)
        return *grads, *[None] * (len(ctx.needs_input_grad) - len(grads))


def _conv2d_gradients(ctx, grad, x, values, input_shape, norm=()):
    """Gradients of x, or of what the norm (weight, bias, mean, rstd, activation) makes of it, of values and bias."""
    needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
    grad_x = grad_values = None
    grad_bias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype) if needs_bias else None
    if needs_x and needs_values and not torch.is_grad_enabled() and plain(grad, x, values):
        both = native.conv2d_backward(grad, x, values, ctx.pattern, ctx.geometry, norm)
        if both is not None:
            return *both, grad_bias
    if not is_batch_last(grad):
        grad = to_layout(grad, BATCH_LAST)
    if needs_x:
        grad_x = conv2d_input_grad(grad, values, ctx.pattern, *ctx.geometry, input_shape)
    if needs_values:
        of_weight = norm_conv2d_weight_grad if norm else conv2d_weight_grad
        grad_values = _like(of_weight(grad, x, *norm, ctx.pattern, *ctx.geometry), values)
    return grad_x, grad_values, grad_bias


class _NormConv2d(torch.autograd.Function):
    compute = staticmethod(below_autograd("norm_conv2d"))

    @staticmethod
    def forward(
        ctx, x, norm_weight, norm_bias, mean, rstd, activation, training, values, bias, pattern, weight_shape, stride,
        padding, dilation, groups,
    ):  # fmt: skip
        geometry = weight_shape, stride, padding, dilation, groups
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, values)
        ctx.activation, ctx.training, ctx.pattern, ctx.geometry = activation, training, pattern, geometry
        ctx.bias_dtype = None if bias is None else bias.dtype
        return ctx._forward_cls.compute(
            x, norm_weight, norm_bias, mean, rstd, activation, training, values, bias, pattern, *geometry
        )

    @staticmethod
    def backward(ctx, grad):
        x, norm_weight, norm_bias, mean, rstd, values = ctx.saved_tensors
        pattern, needs = ctx.pattern, ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * len(needs)
        if not is_batch_last(grad):
            grad = to_layout(grad, BATCH_LAST)
        if needs[7]:
            value_grad = norm_conv2d_weight_grad(
                grad, x, norm_weight, norm_bias, mean, rstd, ctx.activation, pattern, *ctx.geometry
            )
            grads[7] = _like(value_grad, values)
        if needs[8]:
            grads[8] = grad.sum((0, 2, 3), dtype=ctx.bias_dtype)
        if any(needs[:3]):
            grad = conv2d_input_grad(grad, values, pattern, *ctx.geometry, x.shape)
            of_norm = batch_norm_backward(
                grad, x, norm_weight, norm_bias, mean, rstd, None, None, ctx.activation, ctx.training
            )
            for i, tensor in enumerate((x, norm_weight, norm_bias)):
                if needs[i]:
                    grads[i] = _as(of_norm[i], tensor.dtype)
        return tuple(grads)


class _NormDepthwise(_NormConv2d):
    """The gradient of its first output. The statistics are for a norm, whose own gradient goes through them."""

    compute = staticmethod(below_autograd("norm_depthwise"))

    @staticmethod
    def forward(ctx, *inputs):
        outputs = _NormConv2d.forward(ctx, *inputs)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx, grad, *_):
        return _NormConv2d.backward(ctx, grad)


class _ConvOfUnfinished(torch.autograd.Function):
    """`norm_conv2d` whose input gradient is that of the activated norm, which has a place of its own in the graph.

    There it meets the gradients of whoever else reads the activation, as it does where that is finished.
    """

    @staticmethod
    def forward(ctx, activated, values, bias, norm, pattern, moments, *geometry):
        ctx.save_for_backward(*norm[:5], values)
        ctx.activation, ctx.pattern, ctx.geometry = norm[5], pattern, geometry
        ctx.bias_dtype = None if bias is None else bias.dtype
        return norm_conv2d(*norm, False, values, bias, pattern, *geometry, moments)

    @staticmethod
    def backward(ctx, grad):
        x, *norm, values = ctx.saved_tensors
        grads = _conv2d_gradients(ctx, grad, x, values, x.shape, (*norm, ctx.activation))
        return *grads, None, None, None, *[None] * len(ctx.geometry)


def conv2d_of_unfinished(
    activated, norm, values, bias, pattern, weight_shape, stride, padding, dilation, groups, moments=None
):
    """The convolution of a deferred output; `norm`: (x, weight, bias, mean, rstd, activation) that it stands for."""
    geometry = weight_shape, stride, padding, dilation, groups
    if torch.is_grad_enabled():
        return _ConvOfUnfinished.apply(activated, values, bias, norm, pattern, moments, *geometry)
    return norm_conv2d(*norm, False, values, bias, pattern, *geometry, moments)


class _BatchNorm(torch.autograd.Function):
    compute = staticmethod(below_autograd("batch_norm"))

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, eps, residual, activation, training):
        training = training or mean is None
        y, used_mean, rstd, used_variance = ctx._forward_cls.compute(
            x, weight, bias, mean, variance, eps, residual, activation, training
        )
        ctx.mark_non_differentiable(used_mean, rstd, used_variance)
        # The slope of the activation is taken from what is kept anyway: x, or the output, which the next layer keeps.
        added, from_output = residual is not None and activation != 0, Activation(activation).slope_from_output
        ctx.save_for_backward(
            x, weight, bias, used_mean, rstd, residual if added and not from_output else None,
            y if added and from_output else None,
        )  # fmt: skip
        ctx.activation, ctx.training, ctx.added = activation, training, residual is not None
        return y, used_mean, rstd, used_variance

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, bias, mean, rstd, residual, output = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_residual = grad if needs[6] else None
        if any(needs[:3]) or ctx.activation:
            grad_x, grad_weight, grad_bias, before_activation = batch_norm_backward(
                grad, x, weight, bias, mean, rstd, residual, output, ctx.activation, ctx.training
            )
            if needs[6] and ctx.activation:
                grad_residual = before_activation
        return (
            grad_x if needs[0] else None,
            _as(grad_weight, weight.dtype) if needs[1] else None,
            _as(grad_bias, bias.dtype) if needs[2] else None,
            None,
            None,
            None,
            grad_residual,
            None,
            None,
        )


def _batch_norm_with_defaults(x, weight, bias, mean, variance, eps, residual=None, activation=0, training=False):
    # The dispatcher leaves out what has its default; the gradients are counted by what is given here.
    return _BatchNorm.apply(x, weight, bias, mean, variance, eps, residual, activation, training)


def _conv2d_norm_differentiable(x, values, bias, pattern, *rest):
    """Where a gradient may be recorded, the operators that it is made of, which have one."""
    if not torch.is_grad_enabled():
        return _conv2d_norm(x, values, bias, pattern, *rest)
    geometry, (norm_weight, norm_bias, mean, variance, eps, residual, activation) = rest[:5], rest[5:]
    check_whole_norm(norm_weight, norm_bias, mean, variance)
    if mean is None:
        mean, variance, eps = x.new_zeros(geometry[0][0]), x.new_ones(geometry[0][0]), 0.0
    y = conv2d(x, values, bias, pattern, *geometry)
    return batch_norm(y, norm_weight, norm_bias, mean, variance, eps, residual, activation, False)[0]


class _MaxPool2d(torch.autograd.Function):
    compute = staticmethod(below_autograd("max_pool2d"))

    @staticmethod
    def forward(ctx, x, *windows):
        y, chosen = ctx._forward_cls.compute(x, *windows)
        ctx.mark_non_differentiable(chosen)
        ctx.save_for_backward(chosen)
        ctx.windows, ctx.input_shape = windows, x.shape
        return y, chosen

    @staticmethod
    def backward(ctx, grad, _):
        (chosen,) = ctx.saved_tensors
        grad_x = max_pool2d_backward(grad, chosen, *ctx.windows, list(ctx.input_shape))
        return grad_x, *[None] * len(ctx.windows)


class _NormMaxPool2d(torch.autograd.Function):
    compute = staticmethod(below_autograd("norm_max_pool2d"))

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, mean, rstd, activation, training, *windows):
        y, chosen = ctx._forward_cls.compute(
            x, norm_weight, norm_bias, mean, rstd, activation, training, *windows
        )  # fmt: skip
        ctx.mark_non_differentiable(chosen)
        ctx.save_for_backward(chosen, x, norm_weight, norm_bias, mean, rstd)
        ctx.activation, ctx.training, ctx.windows = activation, training, windows
        return y, chosen

    @staticmethod
    def backward(ctx, grad, _):
        chosen, x, *norm = ctx.saved_tensors
        grads = norm_max_pool2d_backward(grad, chosen, x, *norm, ctx.activation, ctx.training, *ctx.windows)
        # Statistics, activation, training and windows have no gradient.
        needs = ctx.needs_input_grad
        of_norm = (
            _as(of, tensor.dtype) if needed else None
            for of, tensor, needed in zip(grads, (x, *norm[:2]), needs, strict=False)
        )
        return *of_norm, *[None] * (len(needs) - 3)


class _AvgPool2d(torch.autograd.Function):
    compute = staticmethod(below_autograd("avg_pool2d"))

    @staticmethod
    def forward(ctx, x, *windows):
        ctx.windows, ctx.input_shape = windows, x.shape
        return ctx._forward_cls.compute(x, *windows)

    @staticmethod
    def backward(ctx, grad):
        grad_x = avg_pool2d_backward(grad, *ctx.windows, list(ctx.input_shape))
        return grad_x, *[None] * len(ctx.windows)


class _ToLayout(torch.autograd.Function):
    compute = staticmethod(below_autograd("to_layout"))

    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout_of(x)
        return ctx._forward_cls.compute(x, layout)

    @staticmethod
    def backward(ctx, grad):
        return (grad if layout_of(grad) == ctx.layout else to_layout(grad, ctx.layout)), None


class _Dropout(torch.autograd.Function):
    compute = staticmethod(below_autograd("dropout"))

    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.p, ctx.seed = p, seed
        return ctx._forward_cls.compute(x, p, seed)

    @staticmethod
    def backward(ctx, grad):
        return dropout(grad, ctx.p, ctx.seed), None, None


def _once(name):
    """An Autograd kernel for an operator that is itself a gradient."""
    compute = below_autograd(name)

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            return compute(*inputs)

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(
                "sparse layers have no second derivative; to differentiate twice, use the dense model "
                "(sparse_ft.to_dense)"
            )

    def kernel(*inputs):
        # Inside an ordinary backward pass no gradient is recorded.
        return Once.apply(*inputs) if torch.is_grad_enabled() else compute(*inputs)

    return kernel


_conv2d_norm = below_autograd("conv2d_norm")
_DIFFERENTIABLE: dict[str, Callable] = {
    "linear": _Linear,
    "conv2d": _Conv2d,
    "norm_conv2d": _NormConv2d,
    "norm_depthwise": _NormDepthwise,
    "batch_norm": _BatchNorm,
    "conv2d_norm": _conv2d_norm_differentiable,
    "max_pool2d": _MaxPool2d,
    "norm_max_pool2d": _NormMaxPool2d,
    "avg_pool2d": _AvgPool2d,
    "to_layout": _ToLayout,
    "dropout": _Dropout,
}
(
    linear, conv2d, norm_conv2d, norm_depthwise, batch_norm, conv2d_norm, max_pool2d, norm_max_pool2d, avg_pool2d,
    to_layout, dropout,
) = (caller(name, function) for name, function in _DIFFERENTIABLE.items())  # fmt: skip
linear_input_grad, linear_weight_grad = caller("linear_input_grad"), caller("linear_weight_grad")
linear_weight_bias_grad = caller("linear_weight_bias_grad")
conv2d_input_grad, conv2d_weight_grad = caller("conv2d_input_grad"), caller("conv2d_weight_grad")
norm_conv2d_weight_grad = caller("norm_conv2d_weight_grad")
norm_depthwise_backward = caller("norm_depthwise_backward")
batch_norm_statistics, batch_norm_backward = caller("batch_norm_statistics"), caller("batch_norm_backward")
max_pool2d_backward, avg_pool2d_backward = caller("max_pool2d_backward"), caller("avg_pool2d_backward")
norm_max_pool2d_backward = caller("norm_max_pool2d_backward")

for _name, _function in {**_DIFFERENTIABLE, "batch_norm": _batch_norm_with_defaults}.items():
    library.impl(_name, getattr(_function, "apply", _function), "Autograd")
for _name in IMPLEMENTATIONS:
    if _name.endswith(("_grad", "_backward", "_statistics")):
        library.impl(_name, _once(_name), "Autograd")


def image_sum(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, 1, 1): sums over the positions of each image; of its rows first, to be more exact."""
    height, width = x.shape[2:]
    rows = avg_pool2d(
        x, tuple(range(height)), tuple(range(1, height + 1)), (1.0,) * height, (0,), (width,), (1.0,)
    )  # fmt: skip
    return avg_pool2d(rows, (0,), (height,), (1.0,), (0,), (1,), (1.0,))


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate):
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx, grad):
        x, gate = ctx.saved_tensors
        grad_gate = None
        if not is_batch_last(grad):
            grad = to_layout(grad, BATCH_LAST)
        if ctx.needs_input_grad[1]:
            grad_gate = image_sum(grad * x)
        return grad * gate if ctx.needs_input_grad[0] else None, grad_gate


def gate(x: Tensor, gate: Tensor) -> Tensor:
    """A batch-last activation (N, C, H, W) times (N, C, 1, 1), whose gradient is summed by the native pooling."""
    if torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad):
        return _Gate.apply(x, gate)
    return x * gate
