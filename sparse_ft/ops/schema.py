"""Every operator of sparse_ft: schema, shape rule, and which backend computes it; gradients.py adds the gradients.

`pattern` is `SparsePattern.tensors`; `values` is the weight's nonzeros, (nnz,) or (nnz, 1); `padding` is
(top, left, bottom, right). Convolutions and norms give batch-last tensors (see layout.py) on every device.

    linear            (..., in), values, bias -> (..., out)
    conv2d            (N, C, H, W), values, bias -> (N, O, OH, OW)
    norm_conv2d       conv2d of activation(norm(x)), which is computed on its way in and never stored
    conv2d_norm       conv2d followed by a norm with given statistics, a residual and an activation, all of which may
                      be left out: activation(norm(conv2d) + residual), stored once
    norm_depthwise    norm_conv2d of a depthwise convolution -> y, its mean and biased variance, with which a norm
                      follows: norm_depthwise_backward goes back through all three at once
    batch_norm        (N, C, H, W) -> y = activation(norm(x) + residual), mean, 1/std, biased variance; measures the
                      statistics unless `mean` and `variance` are given; `training` says that they are x's own
    batch_norm_statistics   (N, C, H, W) -> mean, biased variance
    max_pool2d        (N, C, H, W) -> y, number of the tap that each value came from (uint8); windows start at `rows`
                      and `columns` and are clipped to the input
    norm_max_pool2d   max_pool2d of activation(norm(x)), which is never stored
    avg_pool2d        (N, C, H, W) -> sums over [rows, row_ends) x [columns, column_ends), scaled
    to_layout         a copy in another memory layout
    dropout           x / (1 - p), or 0 with probability p: the random number of element i of the contiguous tensor is
                      made of the seed and i alone, so that the gradient is the same operator and nothing is kept
    *_input_grad, *_weight_grad, batch_norm_backward    their gradients, operators too
    linear_weight_bias_grad    both in one pass over the gradient

Activations are float32, or bfloat16 beside float32 weights and statistics; gradients of either have its type, and
`*_weight_grad` gives float32. Other types run on the reference backend.

Source of the three products: SparseProp (Nikdan et al., ICML 2023, arXiv 2302.04852).
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_ft.ops import allocation, calls, native, reference
from sparse_ft.ops.checks import (
    check_activation,
    check_channels,
    check_features,
    check_geometry,
    check_image,
    check_layout,
    check_probability,
    check_same_shape,
    check_weight,
    check_whole_norm,
    check_windows,
)
from sparse_ft.ops.layout import BATCH_LAST, empty, is_batch_last
from sparse_ft.ops.native import native_reason
from sparse_ft.ops.reference import wide_dtype

library = torch.library.Library("sparse_ft", "DEF")
_CONV = "int[] weight_shape, int[] stride, int[] padding, int[] dilation, int groups"
_NORM = "Tensor? norm_weight, Tensor? norm_bias, Tensor mean, Tensor rstd, int activation"
_OUTER = "Tensor? outer_weight, Tensor? outer_bias, Tensor outer_mean, Tensor outer_rstd, int outer_activation"
_RESULT = (
    "Tensor? norm_weight, Tensor? norm_bias, Tensor? mean, Tensor? variance, float eps, Tensor? residual,"
    " int activation"
)
_MAXIMUM = "int[] rows, int[] columns, int[] kernel, int[] dilation"
_AVERAGE = "int[] rows, int[] row_ends, float[] row_scale, int[] columns, int[] column_ends, float[] column_scale"
_LINEAR = "int in_features, int out_features"

for _schema in (
    f"linear(Tensor x, Tensor values, Tensor? bias, Tensor[] pattern, {_LINEAR}) -> Tensor",
    f"linear_input_grad(Tensor grad, Tensor values, Tensor[] pattern, {_LINEAR}) -> Tensor",
    f"linear_weight_grad(Tensor grad, Tensor x, Tensor[] pattern, {_LINEAR}) -> Tensor",
    f"linear_weight_bias_grad(Tensor grad, Tensor x, Tensor[] pattern, {_LINEAR}) -> (Tensor, Tensor)",
    f"conv2d(Tensor x, Tensor values, Tensor? bias, Tensor[] pattern, {_CONV}) -> Tensor",
    f"conv2d_input_grad(Tensor grad, Tensor values, Tensor[] pattern, {_CONV}, SymInt[] input_shape) -> Tensor",
    f"conv2d_weight_grad(Tensor grad, Tensor x, Tensor[] pattern, {_CONV}) -> Tensor",
    f"norm_conv2d(Tensor x, {_NORM}, bool training, Tensor values, Tensor? bias, Tensor[] pattern, {_CONV}) -> Tensor",
    f"norm_conv2d_weight_grad(Tensor grad, Tensor x, {_NORM}, Tensor[] pattern, {_CONV}) -> Tensor",
    f"norm_depthwise(Tensor x, {_NORM}, bool training, Tensor values, Tensor? bias, Tensor[] pattern, {_CONV})"
    " -> (Tensor, Tensor, Tensor)",
    f"norm_depthwise_backward(Tensor grad, Tensor y, {_OUTER}, Tensor x, {_NORM}, bool training, Tensor values,"
    f" Tensor[] pattern, {_CONV}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"conv2d_norm(Tensor x, Tensor values, Tensor? bias, Tensor[] pattern, {_CONV}, {_RESULT}) -> Tensor",
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? variance, float eps,"
    " Tensor? residual=None, int activation=0, bool training=False) -> (Tensor, Tensor, Tensor, Tensor)",
    "batch_norm_statistics(Tensor x) -> (Tensor, Tensor)",
    "batch_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd,"
    " Tensor? residual, Tensor? output, int activation, bool training) -> (Tensor, Tensor, Tensor, Tensor)",
    f"max_pool2d(Tensor x, {_MAXIMUM}) -> (Tensor, Tensor)",
    f"max_pool2d_backward(Tensor grad, Tensor chosen, {_MAXIMUM}, SymInt[] input_shape) -> Tensor",
    f"norm_max_pool2d(Tensor x, {_NORM}, bool training, {_MAXIMUM}) -> (Tensor, Tensor)",
    f"norm_max_pool2d_backward(Tensor grad, Tensor chosen, Tensor x, {_NORM}, bool training, {_MAXIMUM})"
    " -> (Tensor, Tensor, Tensor)",
    f"avg_pool2d(Tensor x, {_AVERAGE}) -> Tensor",
    f"avg_pool2d_backward(Tensor grad, {_AVERAGE}, SymInt[] input_shape) -> Tensor",
    "to_layout(Tensor x, int layout) -> Tensor",
    "dropout(Tensor x, float p, int seed) -> Tensor",
):
    library.define(_schema)


def _nnz(pattern: list[Tensor]) -> int:
    return pattern[1].numel()


def conv2d_output_shape(x_shape, *conv) -> tuple[int, int, int, int]:
    """(N, O, OH, OW) of a convolution; ValueError where the sizes do not fit."""
    try:
        return _known_output_shape(x_shape, *conv)
    except TypeError:  # lists, or the symbols of a tracer
        return _output_shape(x_shape, *conv)


def _output_shape(x_shape, weight_shape, stride, padding, dilation, groups) -> tuple[int, int, int, int]:
    check_image("the input", x_shape)
    check_geometry(tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)
    n, c, h, w = x_shape
    if c != weight_shape[1] * groups:
        raise ValueError(f"the convolution takes {weight_shape[1] * groups} channels, the input has {c}")
    top, left, bottom, right = padding
    oh = (h + top + bottom - dilation[0] * (weight_shape[2] - 1) - 1) // stride[0] + 1
    ow = (w + left + right - dilation[1] * (weight_shape[3] - 1) - 1) // stride[1] + 1
    if isinstance(oh, int) and isinstance(ow, int) and (oh < 1 or ow < 1):
        raise ValueError(f"an input of {h} x {w} is smaller than the kernel's reach")
    return n, weight_shape[0], oh, ow


_known_output_shape = functools.lru_cache(maxsize=4096)(_output_shape)


def _check_linear(pattern, values, bias, in_features, out_features) -> None:
    check_weight(pattern, values, bias, out_features, in_features)


def _check_conv2d(pattern, values, bias, weight_shape, stride, groups) -> None:
    t_rows = stride[0] * stride[1] * weight_shape[1] * groups
    check_weight(pattern, values, bias, weight_shape[0], t_rows)


def _no_value_grad(grad: Tensor, pattern: list[Tensor]) -> Tensor:
    return grad.new_zeros(_nnz(pattern), dtype=torch.float32)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _batch_last(x: Tensor) -> Tensor:
    return x if is_batch_last(x) else native.to_layout(x, BATCH_LAST)


# ---- what each operator computes -------------------------------------------------------------------


# What the core takes as it is, it checks itself, and is done. What it does not is checked here: it is wrong, or for
# the reference backend, or becomes a contiguous or batch-last copy, or has no elements.


def _linear(x, values, bias, pattern, in_features, out_features):
    y = native.linear(x, values, bias, pattern, in_features, out_features)
    if y is not None:
        return y
    check_features("the input", x, in_features)
    _check_linear(pattern, values, bias, in_features, out_features)
    if native_reason(x, weights=(values, bias)):
        return reference.linear(x, values, bias, pattern, in_features, out_features)
    if 0 in (*x.shape[:-1], out_features):
        return x.new_empty(*x.shape[:-1], out_features)
    return native.linear(
        x.contiguous(), values.contiguous(), _contiguous(bias), pattern, in_features, out_features
    )  # fmt: skip


def _linear_input_grad(grad, values, pattern, in_features, out_features):
    grad_x = native.linear_input_grad(grad, values, pattern, in_features, out_features)
    if grad_x is not None:
        return grad_x
    check_features("the gradient", grad, out_features)
    _check_linear(pattern, values, None, in_features, out_features)
    if native_reason(grad, weights=(values,)):
        return reference.linear_input_grad(grad, values, pattern, in_features, out_features)
    if 0 in (*grad.shape[:-1], in_features):
        return grad.new_empty(*grad.shape[:-1], in_features)
    return native.linear_input_grad(grad.contiguous(), values.contiguous(), pattern, in_features, out_features)


def _linear_weight_grad(grad, x, pattern, in_features, out_features):
    value_grad = native.linear_weight_grad(grad, x, pattern, in_features, out_features)
    if value_grad is not None:
        return value_grad
    _check_linear_weight_grad(grad, x, pattern, in_features, out_features)
    if native_reason(grad, x):
        return reference.linear_weight_grad(grad, x, pattern, in_features, out_features)
    if grad.numel() == 0 or x.numel() == 0:
        return _no_value_grad(grad, pattern)
    return native.linear_weight_grad(grad.contiguous(), x.contiguous(), pattern, in_features, out_features)


def _linear_weight_bias_grad(grad, x, pattern, in_features, out_features):
    grads = native.linear_weight_grad(grad, x, pattern, in_features, out_features, of_bias=True)
    if grads is not None:
        return grads
    _check_linear_weight_grad(grad, x, pattern, in_features, out_features)
    if native_reason(grad, x) or grad.numel() == 0 or x.numel() == 0:
        tokens = grad.reshape(math.prod(grad.shape[:-1]), out_features)
        value_grad = _linear_weight_grad(grad, x, pattern, in_features, out_features)
        return value_grad, tokens.sum(0, dtype=wide_dtype(grad))
    return native.linear_weight_grad(
        grad.contiguous(), x.contiguous(), pattern, in_features, out_features, of_bias=True
    )  # fmt: skip


def _check_linear_weight_grad(grad, x, pattern, in_features, out_features) -> None:
    check_features("the input", x, in_features)
    check_same_shape("the gradient", grad, (*x.shape[:-1], out_features))
    _check_linear(pattern, None, None, in_features, out_features)


def _conv2d(x, values, bias, pattern, weight_shape, stride, padding, dilation, groups, moments=None):
    conv = (weight_shape, stride, padding, dilation, groups)
    y = native.conv2d(x, values, bias, pattern, conv, moments=moments)
    if y is not None:
        return y
    shape = conv2d_output_shape(x.shape, *conv)
    _check_conv2d(pattern, values, bias, weight_shape, stride, groups)
    if native_reason(x, weights=(values, bias)):
        return _batch_last(reference.conv2d(x, values, bias, pattern, *conv))
    if 0 in shape:
        return empty(shape, BATCH_LAST, x)
    return native.conv2d(
        native.as_batch_last(x), values.contiguous(), _contiguous(bias), pattern, conv, moments=moments
    )  # fmt: skip


def _conv2d_input_grad(grad, values, pattern, weight_shape, stride, padding, dilation, groups, input_shape):
    conv = (weight_shape, stride, padding, dilation, groups)
    grad_x = native.conv2d_input_grad(grad, values, pattern, conv, input_shape)
    if grad_x is not None:
        return grad_x
    check_same_shape("the gradient", grad, conv2d_output_shape(input_shape, *conv))
    _check_conv2d(pattern, values, None, weight_shape, stride, groups)
    if native_reason(grad, weights=(values,)):
        return _batch_last(reference.conv2d_input_grad(grad, values, pattern, *conv, input_shape))
    if 0 in input_shape:
        return empty(input_shape, BATCH_LAST, grad)
    return native.conv2d_input_grad(native.as_batch_last(grad), values.contiguous(), pattern, conv, input_shape)


def _conv2d_weight_grad(grad, x, pattern, weight_shape, stride, padding, dilation, groups):
    conv = (weight_shape, stride, padding, dilation, groups)
    value_grad = native.conv2d_weight_grad(grad, x, pattern, conv)
    if value_grad is not None:
        return value_grad
    check_same_shape("the gradient", grad, conv2d_output_shape(x.shape, *conv))
    _check_conv2d(pattern, None, None, weight_shape, stride, groups)
    if native_reason(grad, x):
        return reference.conv2d_weight_grad(grad, x, pattern, *conv)
    if grad.numel() == 0 or x.numel() == 0:
        return _no_value_grad(grad, pattern)
    return native.conv2d_weight_grad(native.as_batch_last(grad), native.as_batch_last(x), pattern, conv)


def _check_norm(x, weight, bias, mean, rstd, activation) -> None:
    check_activation(activation)
    for name, tensor in (("the norm's weight", weight), ("its bias", bias), ("mean", mean), ("rstd", rstd)):
        check_channels(name, tensor, x.shape[1])


def _norm_conv2d(
    x, norm_weight, norm_bias, mean, rstd, activation, training, values, bias, pattern, weight_shape, stride, padding,
    dilation, groups, moments=None,
):  # fmt: skip
    conv, norm = (weight_shape, stride, padding, dilation, groups), (mean, rstd, norm_weight, norm_bias)
    y = native.conv2d(x, values, bias, pattern, conv, (*norm, activation), moments=moments)
    if y is not None:
        return y
    shape = conv2d_output_shape(x.shape, *conv)
    _check_conv2d(pattern, values, bias, weight_shape, stride, groups)
    _check_norm(x, norm_weight, norm_bias, mean, rstd, activation)
    if native_reason(x, weights=(*norm, values, bias)):
        normalised = reference.normalise(x, norm_weight, norm_bias, mean, rstd, activation)
        return _batch_last(reference.conv2d(normalised, values, bias, pattern, *conv))
    if 0 in shape:
        return empty(shape, BATCH_LAST, x)
    return native.conv2d(
        native.as_batch_last(x), values.contiguous(), _contiguous(bias), pattern, conv,
        (*map(_contiguous, norm), activation), moments=moments,
    )  # fmt: skip


def _norm_conv2d_weight_grad(
    grad, x, norm_weight, norm_bias, mean, rstd, activation, pattern, weight_shape, stride, padding, dilation, groups
):
    conv, norm = (weight_shape, stride, padding, dilation, groups), (mean, rstd, norm_weight, norm_bias)
    value_grad = native.conv2d_weight_grad(grad, x, pattern, conv, (*norm, activation))
    if value_grad is not None:
        return value_grad
    check_same_shape("the gradient", grad, conv2d_output_shape(x.shape, *conv))
    _check_conv2d(pattern, None, None, weight_shape, stride, groups)
    _check_norm(x, norm_weight, norm_bias, mean, rstd, activation)
    if native_reason(grad, x, weights=norm):
        normalised = reference.normalise(x, norm_weight, norm_bias, mean, rstd, activation)
        return reference.conv2d_weight_grad(grad, normalised, pattern, *conv)
    if grad.numel() == 0 or x.numel() == 0:
        return _no_value_grad(grad, pattern)
    return native.conv2d_weight_grad(
        native.as_batch_last(grad), native.as_batch_last(x), pattern, conv, (*map(_contiguous, norm), activation)
    )  # fmt: skip


def _check_depthwise(weight_shape, groups) -> None:
    if weight_shape[1] != 1 or weight_shape[0] != groups:
        raise ValueError(
            f"a depthwise convolution has a filter for each channel, not {tuple(weight_shape)} in {groups} "
            "groups: use norm_conv2d and batch_norm"
        )


def _norm_depthwise(
    x, norm_weight, norm_bias, mean, rstd, activation, training, values, bias, pattern, weight_shape, stride, padding,
    dilation, groups,
):  # fmt: skip
    conv, norm = (weight_shape, stride, padding, dilation, groups), (norm_weight, norm_bias, mean, rstd)
    outputs = native.norm_depthwise(x, (*norm, activation), values, bias, pattern, conv)
    if outputs is not None:
        return outputs
    _check_depthwise(weight_shape, groups)
    conv2d_output_shape(x.shape, *conv)
    _check_conv2d(pattern, values, bias, weight_shape, stride, groups)
    _check_norm(x, norm_weight, norm_bias, mean, rstd, activation)
    if native_reason(x, weights=(*norm, values, bias)) or x.numel() == 0:
        normalised = reference.normalise(x, norm_weight, norm_bias, mean, rstd, activation)
        y = _batch_last(reference.conv2d(normalised, values, bias, pattern, *conv))
        return y, *reference.batch_norm_statistics(y)
    norm = (*map(_contiguous, norm), activation)
    return native.norm_depthwise(
        native.as_batch_last(x), norm, values.contiguous(), _contiguous(bias), pattern, conv
    )  # fmt: skip


def _norm_depthwise_backward(
    grad, y, outer_weight, outer_bias, outer_mean, outer_rstd, outer_activation, x, norm_weight, norm_bias, mean,
    rstd, activation, training, values, pattern, weight_shape, stride, padding, dilation, groups,
):  # fmt: skip
    conv = (weight_shape, stride, padding, dilation, groups)
    inner = (norm_weight, norm_bias, mean, rstd, activation)
    outer = (outer_weight, outer_bias, outer_mean, outer_rstd, outer_activation)
    grads = native.norm_depthwise_backward(grad, y, outer, x, inner, training, values, pattern, conv)
    if grads is not None:
        return grads
    _check_depthwise(weight_shape, groups)
    shape = conv2d_output_shape(x.shape, *conv)
    for name, tensor in (("the gradient", grad), ("the output", y)):
        check_same_shape(name, tensor, shape)
    _check_conv2d(pattern, values, None, weight_shape, stride, groups)
    _check_norm(x, *inner)
    _check_norm(y, *outer)
    inner = (*map(_contiguous, inner[:4]), activation)
    outer = (*map(_contiguous, outer[:4]), outer_activation)
    if native_reason(grad, y, x, weights=(*inner[:4], *outer[:4], values)) or x.numel() == 0:
        return _one_by_one(grad, y, outer, x, inner, training, values, pattern, *conv)
    grad, y, x = map(native.as_batch_last, (grad, y, x))
    return native.norm_depthwise_backward(grad, y, outer, x, inner, training, values.contiguous(), pattern, conv)


def _one_by_one(grad, y, outer, x, inner, training, values, pattern, weight_shape, stride, padding, dilation, groups):
    """What `norm_depthwise_backward` is made of."""

    def back(grad, x, norm, training):
        weight, bias, mean, rstd, activation = norm
        return reference.batch_norm_backward(grad, x, weight, bias, mean, rstd, None, None, activation, training)

    conv = (weight_shape, stride, padding, dilation, groups)
    grad_y, *outer_grads, _ = back(grad, y, outer, True)
    value_grad = reference.conv2d_weight_grad(grad_y, reference.normalise(x, *inner), pattern, *conv)
    through = reference.conv2d_input_grad(grad_y, values, pattern, *conv, x.shape)
    grad_x, *inner_grads, _ = back(through, x, inner, training)
    return _batch_last(grad_x), *inner_grads, value_grad, *outer_grads


def _conv2d_norm(
    x, values, bias, pattern, weight_shape, stride, padding, dilation, groups, norm_weight, norm_bias, mean, variance,
    eps, residual, activation,
):  # fmt: skip
    conv, norm = (weight_shape, stride, padding, dilation, groups), (mean, variance, norm_weight, norm_bias)
    check_whole_norm(norm_weight, norm_bias, mean, variance)
    y = native.conv2d(x, values, bias, pattern, conv, result=(*norm, eps, residual, activation))
    if y is not None:
        return y
    shape = conv2d_output_shape(x.shape, *conv)
    _check_conv2d(pattern, values, bias, weight_shape, stride, groups)
    check_activation(activation)
    for name, tensor in zip(("mean", "variance", "the norm's weight", "its bias"), norm, strict=True):
        check_channels(name, tensor, shape[1])
    if residual is not None:
        check_same_shape("the residual", residual, shape)
    if native_reason(x, residual, weights=(values, bias, *norm)):
        y = reference.conv2d(x, values, bias, pattern, *conv)
        return _batch_last(reference.finish(y, norm_weight, norm_bias, mean, variance, eps, residual, activation))
    if 0 in shape:
        return empty(shape, BATCH_LAST, x)
    residual = None if residual is None else native.as_batch_last(residual)
    return native.conv2d(
        native.as_batch_last(x), values.contiguous(), _contiguous(bias), pattern, conv,
        result=(*map(_contiguous, norm), eps, residual, activation),
    )  # fmt: skip


def _batch_norm(x, weight, bias, mean, variance, eps, residual=None, activation=0, training=False):
    outputs = native.batch_norm(x, weight, bias, mean, variance, eps, residual, activation)
    if outputs is not None:
        return outputs
    check_image("the input", x.shape)
    check_activation(activation)
    for name, tensor in (("weight", weight), ("bias", bias), ("mean", mean), ("variance", variance)):
        check_channels(name, tensor, x.shape[1])
    if (mean is None) != (variance is None):
        raise ValueError("batch_norm takes mean and variance together, or neither")
    if residual is not None:
        check_same_shape("the residual", residual, x.shape)
    if native_reason(x, residual, weights=(weight, bias, mean, variance)) or x.numel() == 0:
        y, mean, rstd, variance = reference.batch_norm(x, weight, bias, mean, variance, eps, residual, activation)
        return _batch_last(y), mean, rstd, variance
    x, residual = native.as_batch_last(x), None if residual is None else native.as_batch_last(residual)
    weight, bias, mean, variance = map(_contiguous, (weight, bias, mean, variance))
    return native.batch_norm(x, weight, bias, mean, variance, eps, residual, activation)


def _batch_norm_statistics(x):
    statistics = native.batch_norm_statistics(x)
    if statistics is not None:
        return statistics
    check_image("the input", x.shape)
    if native_reason(x) or x.numel() == 0:
        return reference.batch_norm_statistics(x)
    return native.batch_norm_statistics(native.as_batch_last(x))


def _batch_norm_backward(grad, x, weight, bias, mean, rstd, residual, output, activation, training):
    norm = (weight, bias, mean, rstd)
    grads = native.batch_norm_backward(grad, x, *norm, residual, output, activation, training)
    if grads is not None:
        return grads
    check_image("the input", x.shape)
    check_activation(activation)
    check_same_shape("the gradient", grad, x.shape)
    for name, tensor in zip(("weight", "bias", "mean", "rstd"), norm, strict=True):
        check_channels(name, tensor, x.shape[1])
    for name, tensor in (("the residual", residual), ("the output", output)):
        if tensor is not None:
            check_same_shape(name, tensor, x.shape)
    if native_reason(grad, x, residual, output, weights=norm) or x.numel() == 0:
        grad_x, grad_weight, grad_bias, grad_residual = reference.batch_norm_backward(
            grad, x, *norm, residual, output, activation, training
        )
        return _batch_last(grad_x), grad_weight, grad_bias, _batch_last(grad_residual)
    grad, x, residual, output = (None if t is None else native.as_batch_last(t) for t in (grad, x, residual, output))
    weight, bias, mean, rstd = map(_contiguous, norm)
    return native.batch_norm_backward(grad, x, weight, bias, mean, rstd, residual, output, activation, training)


def _residual_shape(x, residual, output):
    """Nothing for a norm that nothing was added to."""
    return x.shape if residual is not None or output is not None else (0, 0, 0, 0)


def _max_pool2d(x, rows, columns, kernel, dilation):
    check_image("the input", x.shape)
    check_windows(x.shape, rows, columns, kernel, dilation)
    if native_reason(x) or x.numel() == 0:
        y, chosen = reference.max_pool2d(x, rows, columns, kernel, dilation)
        return _batch_last(y), _batch_last(chosen)
    x = native.as_batch_last(x)
    y = empty((*x.shape[:2], len(rows), len(columns)), BATCH_LAST, x)
    chosen = torch.empty_like(y, dtype=torch.uint8)
    native.pool(x, native.max_axes(x.shape, rows, columns, kernel, dilation), y, chosen)
    return y, chosen


def _max_pool2d_backward(grad, chosen, rows, columns, kernel, dilation, input_shape):
    check_windows(input_shape, rows, columns, kernel, dilation)
    check_same_shape("the gradient", grad, (*input_shape[:2], len(rows), len(columns)))
    check_same_shape("the choice", chosen, grad.shape)
    if native_reason(grad) or grad.numel() == 0:
        return _batch_last(reference.max_pool2d_backward(grad, chosen, rows, columns, kernel, dilation, input_shape))
    grad, chosen, grad_x = native.as_batch_last(grad), _batch_last(chosen), empty(input_shape, BATCH_LAST, grad)
    native.pool_backward(grad, native.max_axes(input_shape, rows, columns, kernel, dilation), chosen, grad_x)
    return grad_x


def _norm_max_pool2d(
    x, norm_weight, norm_bias, mean, rstd, activation, training, rows, columns, kernel, dilation
):  # fmt: skip
    check_image("the input", x.shape)
    check_windows(x.shape, rows, columns, kernel, dilation)
    _check_norm(x, norm_weight, norm_bias, mean, rstd, activation)
    norm = (*map(_contiguous, (norm_weight, norm_bias, mean, rstd)), activation)
    if native_reason(x, weights=norm[:4]) or x.numel() == 0 or not rows or not columns:
        y, chosen = reference.max_pool2d(reference.normalise(x, *norm), rows, columns, kernel, dilation)
        return _batch_last(y), _batch_last(chosen)
    axes = native.max_axes(x.shape, rows, columns, kernel, dilation)
    return native.norm_max_pool(native.as_batch_last(x), norm, axes, (*x.shape[:2], len(rows), len(columns)))


def _norm_max_pool2d_backward(
    grad, chosen, x, norm_weight, norm_bias, mean, rstd, activation, training, rows, columns, kernel, dilation
):
    check_image("the input", x.shape)
    check_windows(x.shape, rows, columns, kernel, dilation)
    check_same_shape("the gradient", grad, (*x.shape[:2], len(rows), len(columns)))
    check_same_shape("the choice", chosen, grad.shape)
    _check_norm(x, norm_weight, norm_bias, mean, rstd, activation)
    norm = (norm_weight, norm_bias, mean, rstd)
    if native_reason(grad, x, weights=norm) or grad.numel() == 0 or chosen.dtype != torch.uint8:
        through = reference.max_pool2d_backward(grad, chosen, rows, columns, kernel, dilation, x.shape)
        grad_x, grad_weight, grad_bias, _ = reference.batch_norm_backward(
            through, x, *norm, None, None, activation, training
        )
        return _batch_last(grad_x), grad_weight, grad_bias
    axes = native.max_axes(x.shape, rows, columns, kernel, dilation)
    grad, chosen, x = native.as_batch_last(grad), _batch_last(chosen), native.as_batch_last(x)
    norm = (*map(_contiguous, norm), activation)
    return native.norm_max_pool_backward(grad, chosen, x, norm, training, axes)


def _avg_pool2d(x, rows, row_ends, row_scale, columns, column_ends, column_scale):
    check_image("the input", x.shape)
    windows = (rows, row_ends, row_scale, columns, column_ends, column_scale)
    axes = native.average_axes(x.shape, *windows)
    if native_reason(x) or x.numel() == 0:
        return _batch_last(reference.avg_pool2d(x, *windows))
    x = native.as_batch_last(x)
    y = empty((*x.shape[:2], len(rows), len(columns)), BATCH_LAST, x)
    native.pool(x, axes, y, None)
    return y


def _avg_pool2d_backward(grad, rows, row_ends, row_scale, columns, column_ends, column_scale, input_shape):
    windows = (rows, row_ends, row_scale, columns, column_ends, column_scale)
    axes = native.average_axes(input_shape, *windows)
    check_same_shape("the gradient", grad, (*input_shape[:2], len(rows), len(columns)))
    if native_reason(grad) or grad.numel() == 0:
        return _batch_last(reference.avg_pool2d_backward(grad, *windows, input_shape))
    grad, grad_x = native.as_batch_last(grad), empty(input_shape, BATCH_LAST, grad)
    native.pool_backward(grad, axes, None, grad_x)
    return grad_x


def _to_layout(x, layout):
    check_image("the input", x.shape)
    check_layout(layout)
    return native.to_layout(x, layout)


def _dropout(x, p, seed):
    check_probability(p)
    if native_reason(x):
        return reference.dropout(x, p, seed)
    out = allocation.empty(x, *x.shape)
    if out.numel():
        native.dropout(x.contiguous(), p, seed, out)
    return out


IMPLEMENTATIONS: dict[str, Callable] = {
    "linear": _linear,
    "linear_input_grad": _linear_input_grad,
    "linear_weight_grad": _linear_weight_grad,
    "linear_weight_bias_grad": _linear_weight_bias_grad,
    "conv2d": _conv2d,
    "conv2d_input_grad": _conv2d_input_grad,
    "conv2d_weight_grad": _conv2d_weight_grad,
    "norm_conv2d": _norm_conv2d,
    "norm_conv2d_weight_grad": _norm_conv2d_weight_grad,
    "norm_depthwise": _norm_depthwise,
    "norm_depthwise_backward": _norm_depthwise_backward,
    "conv2d_norm": _conv2d_norm,
    "batch_norm": _batch_norm,
    "batch_norm_statistics": _batch_norm_statistics,
    "batch_norm_backward": _batch_norm_backward,
    "max_pool2d": _max_pool2d,
    "max_pool2d_backward": _max_pool2d_backward,
    "norm_max_pool2d": _norm_max_pool2d,
    "norm_max_pool2d_backward": _norm_max_pool2d_backward,
    "avg_pool2d": _avg_pool2d,
    "avg_pool2d_backward": _avg_pool2d_backward,
    "to_layout": _to_layout,
    "dropout": _dropout,
}
for _name, _function in IMPLEMENTATIONS.items():
    for _key in ("CPU", "CUDA", "MPS"):
        library.impl(_name, _function, _key)


# ---- shapes, for torch.compile and torch.export ----------------------------------------------------


@torch.library.register_fake("sparse_ft::linear")
def _(x, values, bias, pattern, in_features, out_features):
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("sparse_ft::linear_input_grad")
def _(grad, values, pattern, in_features, out_features):
    return grad.new_empty(*grad.shape[:-1], in_features)


@torch.library.register_fake("sparse_ft::linear_weight_grad")
def _(grad, x, pattern, in_features, out_features):
    return grad.new_empty(_nnz(pattern), dtype=wide_dtype(grad))


@torch.library.register_fake("sparse_ft::linear_weight_bias_grad")
def _(grad, x, pattern, in_features, out_features):
    dtype = wide_dtype(grad)
    return grad.new_empty(_nnz(pattern), dtype=dtype), grad.new_empty(out_features, dtype=dtype)


@torch.library.register_fake("sparse_ft::conv2d")
def _(x, values, bias, pattern, weight_shape, stride, padding, dilation, groups):
    return empty(conv2d_output_shape(x.shape, weight_shape, stride, padding, dilation, groups), BATCH_LAST, x)


@torch.library.register_fake("sparse_ft::conv2d_input_grad")
def _(grad, values, pattern, weight_shape, stride, padding, dilation, groups, input_shape):
    return empty(input_shape, BATCH_LAST, grad)


@torch.library.register_fake("sparse_ft::conv2d_weight_grad")
def _(grad, x, pattern, weight_shape, stride, padding, dilation, groups):
    return grad.new_empty(_nnz(pattern), dtype=wide_dtype(grad))


@torch.library.register_fake("sparse_ft::norm_conv2d")
def _(
    x, norm_weight, norm_bias, mean, rstd, activation, training, values, bias, pattern, weight_shape, stride, padding,
    dilation, groups,
):  # fmt: skip
    return empty(conv2d_output_shape(x.shape, weight_shape, stride, padding, dilation, groups), BATCH_LAST, x)


@torch.library.register_fake("sparse_ft::conv2d_norm")
def _(
    x, values, bias, pattern, weight_shape, stride, padding, dilation, groups, norm_weight, norm_bias, mean, variance,
    eps, residual, activation,
):  # fmt: skip
    return empty(conv2d_output_shape(x.shape, weight_shape, stride, padding, dilation, groups), BATCH_LAST, x)


@torch.library.register_fake("sparse_ft::norm_conv2d_weight_grad")
def _(
    grad, x, norm_weight, norm_bias, mean, rstd, activation, pattern, weight_shape, stride, padding, dilation, groups
):
    return grad.new_empty(_nnz(pattern), dtype=wide_dtype(grad))


@torch.library.register_fake("sparse_ft::norm_depthwise")
def _(
    x, norm_weight, norm_bias, mean, rstd, activation, training, values, bias, pattern, weight_shape, stride, padding,
    dilation, groups,
):  # fmt: skip
    shape = conv2d_output_shape(x.shape, weight_shape, stride, padding, dilation, groups)
    statistics = [x.new_empty(shape[1], dtype=wide_dtype(x)) for _ in range(2)]
    return empty(shape, BATCH_LAST, x), *statistics


@torch.library.register_fake("sparse_ft::norm_depthwise_backward")
def _(
    grad, y, outer_weight, outer_bias, outer_mean, outer_rstd, outer_activation, x, norm_weight, norm_bias, mean,
    rstd, activation, training, values, pattern, weight_shape, stride, padding, dilation, groups,
):  # fmt: skip
    channels = x.shape[1]
    return (
        empty(x.shape, BATCH_LAST, x),
        *(mean.new_empty(channels) for _ in range(2)),
        grad.new_empty(_nnz(pattern), dtype=wide_dtype(grad)),
        *(outer_mean.new_empty(channels) for _ in range(2)),
    )


@torch.library.register_fake("sparse_ft::batch_norm")
def _(x, weight, bias, mean, variance, eps, residual=None, activation=0, training=False):
    dtype = wide_dtype(x) if mean is None else mean.dtype
    stats = [x.new_empty(x.shape[1], dtype=dtype) for _ in range(3)]
    return empty(x.shape, BATCH_LAST, x), *stats


@torch.library.register_fake("sparse_ft::batch_norm_statistics")
def _(x):
    dtype = wide_dtype(x)
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


@torch.library.register_fake("sparse_ft::batch_norm_backward")
def _(grad, x, weight, bias, mean, rstd, residual, output, activation, training):
    channels = x.shape[1]
    return (
        empty(x.shape, BATCH_LAST, x),
        mean.new_empty(channels),
        mean.new_empty(channels),
        empty(_residual_shape(x, residual, output), BATCH_LAST, x),
    )


@torch.library.register_fake("sparse_ft::max_pool2d")
def _(x, rows, columns, kernel, dilation):
    y = empty((*x.shape[:2], len(rows), len(columns)), BATCH_LAST, x)
    return y, torch.empty_like(y, dtype=torch.uint8)


@torch.library.register_fake("sparse_ft::max_pool2d_backward")
def _(grad, chosen, rows, columns, kernel, dilation, input_shape):
    return empty(input_shape, BATCH_LAST, grad)


@torch.library.register_fake("sparse_ft::norm_max_pool2d")
def _(x, norm_weight, norm_bias, mean, rstd, activation, training, rows, columns, kernel, dilation):
    y = empty((*x.shape[:2], len(rows), len(columns)), BATCH_LAST, x)
    return y, torch.empty_like(y, dtype=torch.uint8)


@torch.library.register_fake("sparse_ft::norm_max_pool2d_backward")
def _(grad, chosen, x, norm_weight, norm_bias, mean, rstd, activation, training, rows, columns, kernel, dilation):
    return empty(x.shape, BATCH_LAST, x), *(mean.new_empty(x.shape[1]) for _ in range(2))


@torch.library.register_fake("sparse_ft::avg_pool2d")
def _(x, rows, row_ends, row_scale, columns, column_ends, column_scale):
    return empty((*x.shape[:2], len(rows), len(columns)), BATCH_LAST, x)


@torch.library.register_fake("sparse_ft::avg_pool2d_backward")
def _(grad, rows, row_ends, row_scale, columns, column_ends, column_scale, input_shape):
    return empty(input_shape, BATCH_LAST, grad)


@torch.library.register_fake("sparse_ft::to_layout")
def _(x, layout):
    return empty(x.shape, layout, x)


@torch.library.register_fake("sparse_ft::dropout")
def _(x, p, seed):
    return x.new_empty(x.shape)


calls.provide(IMPLEMENTATIONS)
