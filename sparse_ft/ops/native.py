"""The native backend: float32 on CPU, its activations also bfloat16. Turns tensors into addresses."""

import functools
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch  # before the native core, which then shares torch's OpenMP runtime
from torch import Tensor

from sparse_ft.ops import _native, philox
from sparse_ft.ops.allocation import ELEMENTS
from sparse_ft.ops.by_tensor import ByTensor
from sparse_ft.ops.checks import check_geometry
from sparse_ft.ops.layout import (
    BATCH_LAST,
    CHANNELS_LAST,
    CONTIGUOUS,
    batch_last_strides,
    empty,
    is_batch_last,
    layout_of,
)


def available_isas() -> list[str]:
    """Instruction sets of the native core that this processor can run, best first."""
    return _native.available_isas()


def active_isa() -> str:
    """The instruction set in use."""
    return _native.active_isa()


def activate_isa(name: str) -> None:
    """Use the kernels of one instruction set; `SPARSE_FT_ISA` does the same at import."""
    if not _native.activate_isa(name):
        raise ValueError(f"instruction set {name!r} is not available here; choose from {available_isas()}")


if os.environ.get("SPARSE_FT_ISA"):
    activate_isa(os.environ["SPARSE_FT_ISA"])


def native_reason(*activations: Tensor | None, weights: Iterable[Tensor | None] = ()) -> str | None:
    """None if the native kernels take these tensors, otherwise why not.

    Activations are float32 or bfloat16, all of one kind; weights (of norms, too, and statistics) are float32.
    """
    weights = tuple(weights)
    for tensor in activations + weights:
        if tensor is not None and not (tensor.dtype is torch.float32 and tensor.is_cpu):
            break
    else:
        return None
    first = None
    for tensor in activations:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"device {tensor.device.type} (native kernels run on CPU)"
        if tensor.dtype not in ELEMENTS:
            return f"dtype {_name(tensor.dtype)} (native kernels take float32, and bfloat16 activations)"
        first = first or tensor.dtype
        if tensor.dtype != first:
            return f"dtypes {_name(first)} and {_name(tensor.dtype)} (native kernels take activations of one)"
    for tensor in weights:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"device {tensor.device.type} (native kernels run on CPU)"
        if tensor.dtype != torch.float32:
            return f"weights of dtype {_name(tensor.dtype)} (native kernels take float32 ones)"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=4096)
def _convolution(weight_shape, stride, padding, dilation, groups) -> _native.Convolution:
    check_geometry(weight_shape, stride, padding, dilation, groups)
    return _native.Convolution(weight_shape, stride, padding, dilation, groups)


def convolution(weight_shape, stride, padding, dilation, groups) -> _native.Convolution:
    try:
        return _convolution(weight_shape, stride, padding, dilation, groups)
    except TypeError:  # lists, as the dispatcher gives them
        return _convolution(tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)


def of_pattern(weight_shape, stride, padding, dilation, groups) -> _native.Convolution:
    """As far as a pattern knows it: `padding` is (top, left)."""
    return convolution(weight_shape, stride, (*padding, 0, 0), dilation, groups)


class _Generated(NamedTuple):
    """A pattern's generated kernels, and how to see that it was written to in place."""

    state: bytes | None  # versions and addresses; None where there are none
    fingerprint: tuple[int, ...]
    programs: _native.Programs | None  # None: there are to be none


_generated: ByTensor[_Generated] = ByTensor()  # of a pattern's first tensor


def programs(pattern: list[Tensor]) -> _native.Programs | None:
    """Where the generated kernels of a pattern are kept, as long as its tensors live and are what they were."""
    if not pattern:
        return None  # malformed: whoever computes with it says so
    first = pattern[0]
    known = _generated.get(first)
    if known is not None and known.programs is None:
        return None
    state = _native.state_of(pattern)
    if known is None or known.state != state or state is None:
        if any(t.dtype is not torch.int32 or not t.is_cpu or not t.is_contiguous() for t in pattern):
            return None  # as malformed
        fingerprint = tuple(_native.fingerprint(t.data_ptr(), t.numel()) for t in pattern)
        # Written, but with the same numbers?
        kept = known.programs if known is not None and known.fingerprint == fingerprint else _native.Programs()
        known = _Generated(state, fingerprint, kept)
        _generated.keep(first, known)
    return known.programs


def compute_plainly(pattern: list[Tensor]) -> None:
    """Generates no kernels for a pattern, which is not used often enough to be worth them."""
    _generated.keep(pattern[0], _Generated(None, (), None))


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _threads(values: int, operations: int = 0) -> int:
    """torch's number of threads, or fewer where few values are read or written, and there is little to compute."""
    return _native.threads(operations, values, torch.get_num_threads())


def build_pattern(weight: Tensor, mask: Tensor | None, conv) -> tuple[list[Tensor], Tensor]:
    """Index tensors [row_ptr, col, t_row_ptr, t_col, perm] and float32 values of a dense weight, on CPU."""
    shape, stride = conv[0], conv[1]
    rows, cols = shape[0], shape[1] * shape[2] * shape[3]
    weight = weight.detach().to("cpu")
    if mask is None and weight.dtype == torch.float64:  # a tiny nonzero may be zero in float32
        mask = weight != 0
    weight = weight.to(torch.float32).contiguous()
    mask = None if mask is None else mask.to("cpu", torch.bool).contiguous()
    threads = _threads(4 * weight.numel())
    nnz = (
        _native.count_nonzero(weight.data_ptr(), weight.numel(), threads)
        if mask is None
        else _native.count_true(mask.data_ptr(), mask.numel(), threads)
    )
    if nnz >= 2**31:
        raise ValueError(
            f"a sparse weight holds at most 2**31 - 1 nonzeros, this one of shape {tuple(shape)} has {nnz}"
        )
    row_ptr = torch.empty(rows + 1, dtype=torch.int32)
    col, t_col, perm = (torch.empty(nnz, dtype=torch.int32) for _ in range(3))
    t_row_ptr = torch.empty(stride[0] * stride[1] * shape[1] * conv[4] + 1, dtype=torch.int32)
    values = torch.empty(nnz)
    _native.build_rows(
        weight.data_ptr(), _pointer(mask), rows, cols, row_ptr.data_ptr(), col.data_ptr(), values.data_ptr(), threads
    )
    _native.build_transpose(
        of_pattern(*conv), row_ptr.data_ptr(), col.data_ptr(), nnz, t_row_ptr.data_ptr(), t_col.data_ptr(),
        perm.data_ptr(),
    )  # fmt: skip
    return [row_ptr, col, t_row_ptr, t_col, perm], values


def to_layout(x: Tensor, layout: int) -> Tensor:
    """A copy of a 4-D tensor in another layout; transposes natively where batch-last is involved."""
    out = empty(x.shape, layout, x)
    have = layout_of(x)
    n, c, h, w = x.shape
    other = layout if have == BATCH_LAST else have
    dense = have != CONTIGUOUS or x.is_contiguous()
    transposed = (have == BATCH_LAST) != (layout == BATCH_LAST) and not (n == 1 and other == CONTIGUOUS)
    if native_reason(x) or not dense or not transposed or x.numel() == 0:
        return out.copy_(x)
    threads, plane = _threads(2 * x.numel()), h * w
    if n == 1:  # (hw, c) <-> (c, hw): a single sample is batch-last where it is contiguous
        rows, cols = (plane, c) if layout == BATCH_LAST else (c, plane)
        batch, from_stride, to_stride = (1, 1), (0, 0, cols), (0, 0, rows)
    elif other == CONTIGUOUS:  # (n, chw) <-> (chw, n)
        rows, cols = (n, c * plane) if layout == BATCH_LAST else (c * plane, n)
        batch, from_stride, to_stride = (1, 1), (0, 0, cols), (0, 0, rows)
    elif layout == BATCH_LAST:  # (n, hw, c) -> (c, hw, n): one (n, c) transpose per position
        rows, cols, batch = n, c, (1, plane)
        from_stride, to_stride = (0, c, plane * c), (0, n, plane * n)
    else:
        rows, cols, batch = c, n, (1, plane)
        from_stride, to_stride = (0, n, plane * n), (0, c, plane * c)
    _native.transpose(
        ELEMENTS[x.dtype], x.data_ptr(), out.data_ptr(), batch, (rows, cols), from_stride, to_stride, threads,
    )  # fmt: skip
    return out


def as_batch_last(x: Tensor) -> Tensor:
    return x if is_batch_last(x) else to_layout(x, BATCH_LAST)


# ---- layers: each gives None, and has done nothing, where the core does not take the tensors as they are: another
# ---- device, type, layout or size


def _new(compute: Callable, *args):
    """What `compute` gives. New tensors count their versions, in inference mode as well: who computes later than asked
    sees whether one has changed."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return compute(*args)
    return compute(*args)


def conv2d(x, values, bias, pattern, geometry, norm=None, result=None, moments=None, out=None) -> Tensor | None:
    """`norm`: (mean, rstd, weight, bias, activation) that x goes through on its way in; `result`: (mean, variance,
    weight, bias, eps, batch-last residual, activation) that the sums go through on their way out; `moments` (see
    statistics.py) are filled where the kernel takes them on the way; `out`: where to, if not to a new tensor."""
    y = _new(
        _native.conv2d, convolution(*geometry), x, values, bias, pattern, programs(pattern), torch.get_num_threads(),
        norm, result, moments is not None, out,
    )  # fmt: skip
    if moments is None or y is None:
        return y
    y, moments.mean, moments.variance = y
    return y


def conv2d_input_grad(grad, values, pattern, geometry, input_shape, out=None) -> Tensor | None:
    return _new(
        _native.conv2d_input_grad, convolution(*geometry), grad, values, pattern, programs(pattern),
        torch.get_num_threads(), input_shape, out,
    )  # fmt: skip


def conv2d_weight_grad(grad, x, pattern, geometry, norm=None, out=None) -> Tensor | None:
    return _new(
        _native.conv2d_weight_grad, convolution(*geometry), grad, x, pattern, programs(pattern),
        torch.get_num_threads(), norm, out,
    )  # fmt: skip


def conv2d_backward(grad, x, values, pattern, geometry, norm=()) -> tuple[Tensor, Tensor] | None:
    """The gradients of x, or of what its norm (weight, bias, mean, rstd, activation) makes of it, and of the values,
    with their shape."""
    norm = (*norm[2:4], *norm[:2], norm[4]) if norm else None
    return _new(
        _native.conv2d_backward, convolution(*geometry), grad, x, values, pattern, programs(pattern),
        torch.get_num_threads(), norm,
    )  # fmt: skip


def norm_depthwise(x, norm, values, bias, pattern, geometry) -> tuple[Tensor, Tensor, Tensor] | None:
    """y = conv2d of the norm (weight, bias, mean, rstd, activation), and y's mean and variance."""
    return _new(
        _native.norm_depthwise, convolution(*geometry), x, norm, values, bias, pattern, torch.get_num_threads()
    )  # fmt: skip


def norm_depthwise_backward(grad, y, outer, x, inner, training, values, pattern, geometry) -> tuple | None:
    """`outer` is y's norm, `inner` x's. Gradients of x, the inner norm's weight and bias, the values, the outer's."""
    return _new(
        _native.norm_depthwise_backward, convolution(*geometry), grad, y, outer, x, inner, training, values, pattern,
        torch.get_num_threads(),
    )  # fmt: skip


_UNIT = ((1, 1), (0, 0, 0, 0), (1, 1), 1)  # stride, padding, dilation, groups of a linear layer


@functools.lru_cache(maxsize=4096)
def _linear(in_features: int, out_features: int) -> _native.Convolution:
    return convolution((out_features, in_features, 1, 1), *_UNIT)


def linear(x, values, bias, pattern, in_features, out_features) -> Tensor | None:
    layer = _linear(in_features, out_features)
    return _new(_native.linear, layer, x, values, bias, pattern, programs(pattern), torch.get_num_threads())


def linear_input_grad(grad, values, pattern, in_features, out_features) -> Tensor | None:
    layer = _linear(in_features, out_features)
    return _new(_native.linear_input_grad, layer, grad, values, pattern, programs(pattern), torch.get_num_threads())


def linear_weight_grad(grad, x, pattern, in_features, out_features, of_bias=False):
    """With `of_bias`, (the weight's gradient, the sum of the gradient over the tokens)."""
    layer = _linear(in_features, out_features)
    return _new(
        _native.linear_weight_grad, layer, grad, x, pattern, programs(pattern), torch.get_num_threads(), of_bias
    )  # fmt: skip


def batch_norm(x, weight, bias, mean, variance, eps: float, residual, activation: int) -> tuple | None:
    """y, mean, rstd, variance; measures the statistics unless they are given."""
    return _new(
        _native.batch_norm, x, weight, bias, mean, variance, eps, residual, activation, torch.get_num_threads()
    )  # fmt: skip


def batch_norm_statistics(x) -> tuple[Tensor, Tensor] | None:
    return _new(_native.batch_norm_statistics, x, torch.get_num_threads())


def batch_norm_backward(
    grad, x, weight, bias, mean, rstd, residual, output, activation: int, training: bool
) -> tuple | None:
    """Gradients of x, weight and bias, and what comes in before the activation: empty where nothing was added."""
    return _new(
        _native.batch_norm_backward, grad, x, weight, bias, mean, rstd, residual, output, activation, training,
        torch.get_num_threads(),
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _max_axis(size: int, first: tuple, taps: int, step: int) -> _native.PoolAxis:
    return _native.PoolAxis(size, first, taps, step)


@functools.lru_cache(maxsize=4096)
def _average_axis(size: int, first: tuple, end: tuple, scale: tuple) -> _native.PoolAxis:
    return _native.PoolAxis(size, first, end, scale)


def max_axes(shape, rows, columns, kernel, dilation) -> tuple[_native.PoolAxis, _native.PoolAxis]:
    return (
        _max_axis(shape[2], tuple(rows), kernel[0], dilation[0]),
        _max_axis(shape[3], tuple(columns), kernel[1], dilation[1]),
    )


def average_axes(shape, rows, row_ends, row_scale, columns, column_ends, column_scale):
    return (
        _average_axis(shape[2], tuple(rows), tuple(row_ends), tuple(row_scale)),
        _average_axis(shape[3], tuple(columns), tuple(column_ends), tuple(column_scale)),
    )


def norm_max_pool(x, norm, axes, shape) -> tuple[Tensor, Tensor] | None:
    """Maxima, of `shape`, of the norm (weight, bias, mean, rstd, activation), and the taps that they came from."""
    chosen = torch.empty_strided(shape, batch_last_strides(shape), dtype=torch.uint8)
    y = _new(_native.norm_max_pool, x, norm, *axes, chosen, torch.get_num_threads())
    return None if y is None else (y, chosen)


def norm_max_pool_backward(grad, chosen, x, norm, training, axes) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of x and the norm's weight and bias."""
    return _new(
        _native.norm_max_pool_backward, grad, chosen, x, norm, training, *axes, torch.get_num_threads()
    )  # fmt: skip


def pool(x: Tensor, axes, y: Tensor, chosen: Tensor | None) -> None:
    threads = _threads(2 * (x.numel() + y.numel()))
    n, c = x.shape[:2]
    _native.pool_forward(
        ELEMENTS[x.dtype], axes[0], axes[1], n, c, x.data_ptr(), y.data_ptr(), _pointer(chosen), threads
    )


def pool_backward(grad: Tensor, axes, chosen: Tensor | None, grad_x: Tensor) -> None:
    threads = _threads(2 * (grad.numel() + grad_x.numel()))
    n, c = grad.shape[:2]
    _native.pool_backward(
        ELEMENTS[grad.dtype], axes[0], axes[1], n, c, grad.data_ptr(), _pointer(chosen), grad_x.data_ptr(), threads
    )


def dropout(x: Tensor, p: float, seed: int, out: Tensor) -> None:
    _native.dropout(
        ELEMENTS[x.dtype], x.data_ptr(), out.data_ptr(), x.numel(), seed, philox.least_kept(p), philox.scale(p),
        _threads(4 * x.numel()),
    )  # fmt: skip


__all__ = ["CHANNELS_LAST", "activate_isa", "active_isa", "available_isas", "native_reason"]
