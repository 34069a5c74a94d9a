"""The reference backend: plain torch on any device and floating dtype, by way of the dense weight.

Slow and readable. It runs what the native backend does not take, and every native kernel is tested against it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from sparse_ft.ops import philox
from sparse_ft.ops.activations import activate, slope
from sparse_ft.ops.pattern import flat_index


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums over `x` are given in, as in torch: float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _wide(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))


def dense_weight(values: Tensor, pattern: list[Tensor], weight_shape) -> Tensor:
    numel = weight_shape[0] * weight_shape[1] * weight_shape[2] * weight_shape[3]
    dense = values.new_zeros(numel)
    dense[flat_index(pattern[0], pattern[1], weight_shape)] = values.reshape(-1)
    return dense.view(*weight_shape)


def _padded(x: Tensor, padding) -> Tensor:
    top, left, bottom, right = padding
    return F.pad(x, (left, right, top, bottom)) if any(padding) else x


def conv2d(x, values, bias, pattern, weight_shape, stride, padding, dilation, groups) -> Tensor:
    weight = dense_weight(values, pattern, weight_shape).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(_padded(x, padding), weight, bias, tuple(stride), 0, tuple(dilation), groups)


def conv2d_input_grad(grad, values, pattern, weight_shape, stride, padding, dilation, groups, input_shape) -> Tensor:
    weight = dense_weight(values, pattern, weight_shape).to(grad.dtype)
    top, left, bottom, right = padding
    n, c, h, w = input_shape
    padded = (n, c, h + top + bottom, w + left + right)
    grad_x = conv2d_input(padded, weight, grad, tuple(stride), 0, tuple(dilation), groups)
    return grad_x[:, :, top : top + h, left : left + w]


def conv2d_weight_grad(grad, x, pattern, weight_shape, stride, padding, dilation, groups) -> Tensor:
    x = _padded(x, padding)
    dense = conv2d_weight(x, tuple(weight_shape), grad, tuple(stride), 0, tuple(dilation), groups)
    return _wide(dense.reshape(-1)[flat_index(pattern[0], pattern[1], weight_shape)])


def linear(x, values, bias, pattern, in_features, out_features) -> Tensor:
    weight = dense_weight(values, pattern, (out_features, in_features, 1, 1))[:, :, 0, 0]
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def linear_input_grad(grad, values, pattern, in_features, out_features) -> Tensor:
    weight = dense_weight(values, pattern, (out_features, in_features, 1, 1))[:, :, 0, 0]
    return grad @ weight.to(grad.dtype)


def linear_weight_grad(grad, x, pattern, in_features, out_features) -> Tensor:
    dense = grad.reshape(-1, out_features).t() @ x.reshape(-1, in_features)
    return _wide(dense.reshape(-1)[flat_index(pattern[0], pattern[1], (out_features, in_features, 1, 1))])


_PER_CHANNEL = (1, -1, 1, 1)


def batch_norm_statistics(x) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(_wide(x), dim=(0, 2, 3), correction=0)
    return mean, variance


def _before_activation(x, weight, bias, mean, rstd, residual) -> Tensor:
    y = (_wide(x) - mean.view(_PER_CHANNEL)) * rstd.view(_PER_CHANNEL)
    if weight is not None:
        y = y * weight.view(_PER_CHANNEL)
    if bias is not None:
        y = y + bias.view(_PER_CHANNEL)
    return y if residual is None else y + residual


def normalise(x, weight, bias, mean, rstd, activation) -> Tensor:
    return activate(_before_activation(x, weight, bias, mean, rstd, None), activation).to(x.dtype)


def finish(y, weight, bias, mean, variance, eps, residual, activation) -> Tensor:
    """What follows a convolution: a norm (if `mean` is given), a residual, an activation."""
    if mean is None:
        return activate(_wide(y) if residual is None else _wide(y) + residual, activation).to(y.dtype)
    return batch_norm(y, weight, bias, mean, variance, eps, residual, activation)[0]


def batch_norm(x, weight, bias, mean, variance, eps, residual, activation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if mean is None:
        mean, variance = batch_norm_statistics(x)
    rstd = torch.rsqrt(variance + eps)
    y = activate(_before_activation(x, weight, bias, mean, rstd, residual), activation)
    return y.to(x.dtype), mean.clone(), rstd, variance.clone()


def batch_norm_backward(
    grad, x, weight, bias, mean, rstd, residual, output, activation, training
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = _wide(grad)
    if activation:
        v = _before_activation(x, weight, bias, mean, rstd, residual) if output is None else _wide(output)
        # Not a product: what an activation cuts off may be infinite.
        slopes = slope(v, activation)
        wide = torch.where(slopes == 0, 0.0, wide * slopes)
    added = residual is not None or output is not None
    grad_residual = wide.to(x.dtype) if added else x.new_empty(0, 0, 0, 0)
    xhat = (_wide(x) - mean.view(_PER_CHANNEL)) * rstd.view(_PER_CHANNEL)
    grad_bias, grad_weight = wide.sum((0, 2, 3)), (wide * xhat).sum((0, 2, 3))
    scale = rstd if weight is None else rstd * weight
    if training:
        count = x.numel() // x.shape[1]
        wide = wide - (grad_bias.view(_PER_CHANNEL) + xhat * grad_weight.view(_PER_CHANNEL)) / count
    grad_x = (wide * scale.view(_PER_CHANNEL)).to(x.dtype)
    return grad_x, grad_weight.to(mean.dtype), grad_bias.to(mean.dtype), grad_residual


def _covered(first: int, taps: int, step: int, size: int) -> list[tuple[int, int]]:
    """(tap, position) of a window, as far as it lies within the axis."""
    return [(t, first + t * step) for t in range(taps) if 0 <= first + t * step < size]


def max_pool2d(x, rows, columns, kernel, dilation) -> tuple[Tensor, Tensor]:
    y = x.new_empty(*x.shape[:2], len(rows), len(columns))
    chosen = torch.empty(y.shape, dtype=torch.uint8, device=x.device)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            covered = [
                (ty * kernel[1] + tx, x[:, :, py, px])
                for ty, py in _covered(row, kernel[0], dilation[0], x.shape[2])
                for tx, px in _covered(column, kernel[1], dilation[1], x.shape[3])
            ]
            y[:, :, i, j], best = torch.stack([value for _, value in covered]).max(0)
            chosen[:, :, i, j] = torch.tensor([tap for tap, _ in covered], dtype=torch.uint8, device=x.device)[best]
    return y, chosen


def max_pool2d_backward(grad, chosen, rows, columns, kernel, dilation, input_shape) -> Tensor:
    grad_x = grad.new_zeros(tuple(input_shape))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            for ty, py in _covered(row, kernel[0], dilation[0], input_shape[2]):
                for tx, px in _covered(column, kernel[1], dilation[1], input_shape[3]):
                    own = chosen[:, :, i, j] == ty * kernel[1] + tx
                    grad_x[:, :, py, px] += torch.where(own, grad[:, :, i, j], 0.0)
    return grad_x


def _averaging(x: Tensor, size: int, first, end, scale) -> Tensor:
    """(windows, size): an axis' windows as a matrix."""
    matrix = torch.zeros(len(first), size, dtype=_wide(x).dtype, device=x.device)
    for row, start, stop, factor in zip(matrix, first, end, scale, strict=True):
        row[start:stop] = factor
    return matrix


def avg_pool2d(x, rows, row_ends, row_scale, columns, column_ends, column_scale) -> Tensor:
    vertical = _averaging(x, x.shape[2], rows, row_ends, row_scale)
    horizontal = _averaging(x, x.shape[3], columns, column_ends, column_scale)
    return torch.einsum("oh,nchw,pw->ncop", vertical, _wide(x), horizontal).to(x.dtype)


def avg_pool2d_backward(grad, rows, row_ends, row_scale, columns, column_ends, column_scale, input_shape) -> Tensor:
    vertical = _averaging(grad, input_shape[2], rows, row_ends, row_scale)
    horizontal = _averaging(grad, input_shape[3], columns, column_ends, column_scale)
    return torch.einsum("oh,ncop,pw->nchw", vertical, _wide(grad), horizontal).to(grad.dtype)


def dropout(x, p, seed) -> Tensor:
    wide = _wide(x.contiguous())
    kept = philox.words(x.numel(), seed, x.device).view(x.shape) >= philox.least_kept(p)
    return (wide * torch.where(kept, philox.scale(p), 0.0).to(wide.dtype)).to(x.dtype)
