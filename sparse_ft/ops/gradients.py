"""Gradients of the operators.

Each operator's Autograd kernel is a `torch.autograd.Function` that calls the operator again below autograd.
`torch.library.register_autograd` would do the same by way of generic tree flattening, which took a third of a small
layer's forward and backward (about 0.1 of 0.3 ms).
"""

import math

import torch
from torch import Tensor

from sparse_ft.ops.activations import Activation
from sparse_ft.ops.layout import BATCH_LAST, is_batch_last, layout_of

_ops = torch.ops.sparse_ft


def _like(gradient: Tensor, values: Tensor) -> Tensor:
    return gradient.to(values.dtype).view_as(values)


class _Weighted(torch.autograd.Function):
    """What the linear layer and the convolution share: x, values, bias, pattern, and their geometry."""

    @staticmethod
    def run(operator, ctx, x, values, bias, pattern, geometry):
        # The input is needed for the weight gradient only.
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, *pattern)
        ctx.geometry, ctx.input_shape, ctx.bias_dtype = geometry, x.shape, None if bias is None else bias.dtype
        with torch._C._AutoDispatchBelowAutograd():
            return operator(x, values, bias, pattern, *geometry)


class _Linear(_Weighted):
    @staticmethod
    def forward(ctx, x, values, bias, pattern, *geometry):
        return _Weighted.run(_ops.linear.default, ctx, x, values, bias, pattern, geometry)

    @staticmethod
    def backward(ctx, grad):
        x, values, *pattern = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = _ops.linear_input_grad.default(grad, values, pattern, *ctx.geometry)
        if ctx.needs_input_grad[1]:
            grad_values = _like(_ops.linear_weight_grad.default(grad, x, pattern, *ctx.geometry), values)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(math.prod(grad.shape[:-1]), grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_values, grad_bias, None, None, None


class _Conv2d(_Weighted):
    @staticmethod
    def forward(ctx, x, values, bias, pattern, *geometry):
        return _Weighted.run(_ops.conv2d.default, ctx, x, values, bias, pattern, geometry)

    @staticmethod
    def backward(ctx, grad):
        x, values, *pattern = ctx.saved_tensors
        grad_x = grad_values = grad_bias = None
        if not is_batch_last(grad):
            grad = _ops.to_layout.default(grad, BATCH_LAST)
        if ctx.needs_input_grad[0]:
            grad_x = _ops.conv2d_input_grad.default(grad, values, pattern, *ctx.geometry, list(ctx.input_shape))
        if ctx.needs_input_grad[1]:
            grad_values = _like(_ops.conv2d_weight_grad.default(grad, x, pattern, *ctx.geometry), values)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype)
        return grad_x, grad_values, grad_bias, None, *[None] * len(ctx.geometry)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, eps, residual, activation, training):
        training = training or mean is None
        with torch._C._AutoDispatchBelowAutograd():
            y, used_mean, rstd, used_variance = _ops.batch_norm.default(
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
            grad_x, grad_weight, grad_bias, before_activation = _ops.batch_norm_backward.default(
                grad, x, weight, bias, mean, rstd, residual, output, ctx.activation, ctx.training
            )
            if needs[6] and ctx.activation:
                grad_residual = before_activation
        return (
            grad_x if needs[0] else None,
            grad_weight.to(weight.dtype) if needs[1] else None,
            grad_bias.to(bias.dtype) if needs[2] else None,
            None,
            None,
            None,
            grad_residual,
            None,
            None,
        )


def _batch_norm(x, weight, bias, mean, variance, eps, residual=None, activation=0, training=False):
    # The dispatcher leaves out what has its default; the gradients are counted by what is given here.
    return _BatchNorm.apply(x, weight, bias, mean, variance, eps, residual, activation, training)


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *windows):
        with torch._C._AutoDispatchBelowAutograd():
            y, chosen = _ops.max_pool2d.default(x, *windows)
        ctx.mark_non_differentiable(chosen)
        ctx.save_for_backward(chosen)
        ctx.windows, ctx.input_shape = windows, x.shape
        return y, chosen

    @staticmethod
    def backward(ctx, grad, _):
        (chosen,) = ctx.saved_tensors
        grad_x = _ops.max_pool2d_backward.default(grad, chosen, *ctx.windows, list(ctx.input_shape))
        return grad_x, *[None] * len(ctx.windows)


class _AvgPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *windows):
        ctx.windows, ctx.input_shape = windows, x.shape
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.avg_pool2d.default(x, *windows)

    @staticmethod
    def backward(ctx, grad):
        grad_x = _ops.avg_pool2d_backward.default(grad, *ctx.windows, list(ctx.input_shape))
        return grad_x, *[None] * len(ctx.windows)


class _ToLayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layout):
        ctx.layout = layout_of(x)
        with torch._C._AutoDispatchBelowAutograd():
            return _ops.to_layout.default(x, layout)

    @staticmethod
    def backward(ctx, grad):
        return (grad if layout_of(grad) == ctx.layout else _ops.to_layout.default(grad, ctx.layout)), None


def _once(operator):
    """An Autograd kernel for an operator that is itself a gradient."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*inputs)

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(
                "sparse layers have no second derivative; to differentiate twice, use the dense model "
                "(sparse_ft.to_dense)"
            )

    def kernel(*inputs):
        if torch.is_grad_enabled():  # inside an ordinary backward pass it is not
            return Once.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    return kernel


def register(library: torch.library.Library, gradient_operators: list[str]) -> None:
    """Give every operator its Autograd kernel."""
    for name, function in (
        ("linear", _Linear.apply),
        ("conv2d", _Conv2d.apply),
        ("batch_norm", _batch_norm),
        ("max_pool2d", _MaxPool2d.apply),
        ("avg_pool2d", _AvgPool2d.apply),
        ("to_layout", _ToLayout.apply),
    ):
        library.impl(name, function, "Autograd")
    for name in gradient_operators:
        library.impl(name, _once(getattr(_ops, name).default), "Autograd")
