"""The native backend: float32 on CPU, its activations also bfloat16. Turns tensors into addresses."""

import functools
import math
import os
from collections.abc import Iterable
from typing import NamedTuple

import torch  # before the native core, which then shares torch's OpenMP runtime
from torch import Tensor

from sparse_ft.ops import _native, philox
from sparse_ft.ops.allocation import ELEMENTS
from sparse_ft.ops.by_tensor import ByTensor
from sparse_ft.ops.layout import BATCH_LAST, CHANNELS_LAST, CONTIGUOUS, empty, is_batch_last, layout_of


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
    return _native.Convolution(weight_shape, stride, padding, dilation, groups)


def convolution(weight_shape, stride, padding, dilation, groups) -> _native.Convolution:
    return _convolution(tuple(weight_shape), tuple(stride), tuple(padding[:2]), tuple(dilation), groups)


class _Generated(NamedTuple):
    """A pattern's generated kernels, and how to see that it was written to in place."""

    versions: list
    fingerprint: tuple[int, ...]
    programs: _native.Programs


_generated: ByTensor[_Generated] = ByTensor()  # of a pattern's first tensor
_plain: ByTensor[bool] = ByTensor()  # first tensors of patterns that no kernels are generated for


def programs(pattern: list[Tensor]) -> _native.Programs | None:
    """Where the generated kernels of a pattern are kept, as long as its tensors live and are what they were."""
    first = pattern[0]
    if _plain.get(first):
        return None
    known = _generated.get(first)
    versions = [(t.data_ptr(), None if t.is_inference() else t._version) for t in pattern]
    if known is None or known.versions != versions or first.is_inference():
        fingerprint = tuple(_native.fingerprint(t.data_ptr(), t.numel()) for t in pattern)
        # Written, but with the same numbers?
        kept = known.programs if known is not None and known.fingerprint == fingerprint else _native.Programs()
        known = _Generated(versions, fingerprint, kept)
        _generated.keep(first, known)
    return known.programs


def compute_plainly(pattern: list[Tensor]) -> None:
    """Generates no kernels for a pattern, which is not used often enough to be worth them."""
    _plain.keep(pattern[0], True)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


# A parallel region costs some microseconds, more on a busy machine: a thread is worth having for this many operations.
_OPERATIONS_PER_THREAD = 400_000


def _threads(operations: int) -> int:
    """torch's number of threads, or fewer where there is little to do."""
    return max(1, min(torch.get_num_threads(), operations // _OPERATIONS_PER_THREAD))


def _linear_threads(nnz: int, x: Tensor, y: Tensor, features: int) -> int:
    return _threads(2 * nnz * (x.numel() // max(1, features)) + x.numel() + y.numel())


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
        convolution(*conv), row_ptr.data_ptr(), col.data_ptr(), nnz, t_row_ptr.data_ptr(), t_col.data_ptr(),
        perm.data_ptr(),
    )  # fmt: skip
    return [row_ptr, col, t_row_ptr, t_col, perm], values


class _Activations:
    """Sizes and strides of a batch-last convolution input or output; a 1x1 convolution without stride or
    padding is one position with N*H*W samples."""

    def __init__(self, shape, flat: bool):
        n, c, h, w = shape
        self.size = (n * h * w, c, 1, 1) if flat else (n, c, h, w)
        self.strides = (1, h * w * n, 0, 0) if flat else (1, h * w * n, w * n, n)
        self.positions = self.size[2:]


def _is_flat(weight_shape, stride, padding) -> bool:
    return weight_shape[2] == weight_shape[3] == 1 and all(s == 1 for s in stride) and not any(padding)


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


def _norm_arguments(norm) -> tuple[int, int, int, int, int] | None:
    """Of (mean, rstd, weight, bias, activation), contiguous tensors."""
    return None if norm is None else (*map(_pointer, norm[:4]), norm[4])


def _result_arguments(result) -> tuple[int, int, int, int, float, int, int] | None:
    if result is None:
        return None
    mean, variance, weight, bias, eps, residual, activation = result
    return (
        _pointer(mean), _pointer(variance), _pointer(weight), _pointer(bias), eps, _pointer(residual), activation
    )  # fmt: skip


def conv2d(
    x, values, bias, pattern, weight_shape, stride, padding, dilation, groups, out: Tensor, norm=None, result=None,
    moments=None,
) -> Tensor:  # fmt: skip
    """`norm`: (mean, rstd, weight, bias, activation) that x goes through on its way in; `result`: (mean, variance,
    weight, bias, eps, batch-last residual, activation) that the sums go through on their way out; `moments` (see
    statistics.py) are filled where the kernel takes them on the way."""
    conv = (tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)
    plan = plan_conv2d(x.shape, out.shape, conv, values.numel(), torch.get_num_threads())
    run_conv2d(plan, as_batch_last(x), values, bias, pattern, programs(pattern), out, norm, result, moments)
    return out


class ConvPlan(NamedTuple):
    """What the calls of a convolution and of its gradients say beside addresses."""

    convolution: _native.Convolution
    size: tuple  # of the input
    strides: tuple
    positions: tuple  # of the output
    out_strides: tuple
    nnz: int
    threads: int


@functools.lru_cache(maxsize=4096)
def plan_conv2d(shape, out_shape, conv, nnz: int, most_threads: int) -> ConvPlan:
    weight_shape, stride, padding = conv[:3]
    flat = _is_flat(weight_shape, stride, padding)
    source, dest = _Activations(shape, flat), _Activations(out_shape, flat)
    # Packing and storing cost about one operation an element, whatever few nonzeros there are.
    positions, elements = math.prod(out_shape) // max(1, out_shape[1]), math.prod(shape) + math.prod(out_shape)
    threads = max(1, min(most_threads, (2 * nnz * positions + elements) // _OPERATIONS_PER_THREAD))
    return ConvPlan(convolution(*conv), source.size, source.strides, dest.positions, dest.strides, nnz, threads)


def run_conv2d(
    plan: ConvPlan, x, values, bias, pattern, programs, out: Tensor, norm=None, result=None, moments=None
) -> None:
    mean = variance = None
    if moments is not None:
        mean, variance = (torch.empty(out.shape[1]) for _ in range(2))
    taken = _native.forward(
        plan.convolution, ELEMENTS[x.dtype], plan.size, x.data_ptr(), plan.strides, plan.positions, out.data_ptr(),
        plan.out_strides, pattern[0].data_ptr(), pattern[1].data_ptr(), values.data_ptr(), _pointer(bias), plan.nnz,
        programs, plan.threads, _norm_arguments(norm), _result_arguments(result), _pointer(mean), _pointer(variance),
    )  # fmt: skip
    if taken:
        moments.mean, moments.variance = mean, variance


def conv2d_input_grad(
    grad, values, pattern, weight_shape, stride, padding, dilation, groups, grad_x: Tensor
) -> Tensor:
    grad, conv = as_batch_last(grad), (tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)
    plan = plan_conv2d(grad_x.shape, grad.shape, conv, values.numel(), torch.get_num_threads())
    _native.input_grad(
        plan.convolution, ELEMENTS[grad.dtype], plan.size, grad.data_ptr(), plan.out_strides, plan.positions,
        grad_x.data_ptr(), plan.strides, pattern[2].data_ptr(), pattern[3].data_ptr(), pattern[4].data_ptr(),
        values.data_ptr(), plan.nnz, programs(pattern), plan.threads,
    )  # fmt: skip
    return grad_x


def conv2d_weight_grad(
    grad, x, pattern, weight_shape, stride, padding, dilation, groups, value_grad: Tensor, norm=None
) -> Tensor:
    grad, x = as_batch_last(grad), as_batch_last(x)
    conv = (tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)
    plan = plan_conv2d(x.shape, grad.shape, conv, value_grad.numel(), torch.get_num_threads())
    _native.weight_grad(
        plan.convolution, ELEMENTS[x.dtype], plan.size, x.data_ptr(), plan.strides, plan.positions, grad.data_ptr(),
        plan.out_strides, pattern[0].data_ptr(), pattern[1].data_ptr(), value_grad.data_ptr(), 0, plan.nnz,
        programs(pattern), plan.threads, _norm_arguments(norm),
    )  # fmt: skip
    return value_grad


def norm_depthwise(
    x, norm, values, bias, pattern, weight_shape, stride, padding, dilation, groups, y: Tensor, mean, variance
) -> None:
    """Fills y = conv2d of the norm (weight, bias, mean, rstd, activation), and y's mean and variance."""
    conv = (tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)
    plan = plan_conv2d(x.shape, y.shape, conv, values.numel(), torch.get_num_threads())
    _native.norm_depthwise_forward(
        plan.convolution, ELEMENTS[x.dtype], plan.size, x.data_ptr(), plan.strides, plan.positions, y.data_ptr(),
        plan.out_strides, pattern[0].data_ptr(), pattern[1].data_ptr(), values.data_ptr(), _pointer(bias), plan.nnz,
        plan.threads, _beside(norm, False, None, None), mean.data_ptr(), variance.data_ptr(),
    )  # fmt: skip


def norm_depthwise_backward(
    grad, y, outer, x, inner, training, values, pattern, weight_shape, stride, padding, dilation, groups,
    grad_x, inner_grads, value_grad, outer_grads,
) -> None:  # fmt: skip
    """`outer` is y's norm, `inner` x's; the gradients are of (weight, bias)."""
    conv = (tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)
    plan = plan_conv2d(x.shape, y.shape, conv, values.numel(), torch.get_num_threads())
    _native.norm_depthwise_backward(
        plan.convolution, ELEMENTS[x.dtype], plan.size, x.data_ptr(), plan.strides, plan.positions, grad.data_ptr(),
        y.data_ptr(), plan.out_strides, pattern[0].data_ptr(), pattern[1].data_ptr(), pattern[2].data_ptr(),
        pattern[3].data_ptr(), pattern[4].data_ptr(), values.data_ptr(), plan.nnz,
        plan.threads, _beside(inner, training, *inner_grads), _beside(outer, True, *outer_grads), grad_x.data_ptr(),
        value_grad.data_ptr(),
    )  # fmt: skip


def _beside(norm, training: bool, grad_weight: Tensor | None, grad_bias: Tensor | None) -> tuple:
    weight, bias, mean, rstd, activation = norm
    return (
        mean.data_ptr(), rstd.data_ptr(), _pointer(weight), _pointer(bias), activation, training,
        _pointer(grad_weight), _pointer(grad_bias),
    )  # fmt: skip


_UNIT = ((1, 1), (0, 0), (1, 1), 1)  # stride, padding, dilation, groups of a linear layer


def _tokens(x: Tensor, features: int) -> tuple[Tensor, tuple, tuple]:
    """Token-major (T, features) as an activation of T samples and one position."""
    x = x.reshape(math.prod(x.shape[:-1]), features).contiguous()
    return x, (x.shape[0], features, 1, 1), (features, 1, 0, 0)


def linear(x, values, bias, pattern, in_features, out_features, out: Tensor) -> Tensor:
    x, size, strides = _tokens(x, in_features)
    conv = convolution((out_features, in_features, 1, 1), *_UNIT)
    _native.forward(
        conv, ELEMENTS[x.dtype], size, x.data_ptr(), strides, (1, 1), out.data_ptr(), (out_features, 1, 0, 0),
        pattern[0].data_ptr(), pattern[1].data_ptr(), values.data_ptr(), _pointer(bias), values.numel(),
        programs(pattern), _linear_threads(values.numel(), x, out, in_features), None, None, 0, 0,
    )  # fmt: skip
    return out


def linear_input_grad(grad, values, pattern, in_features, out_features, grad_x: Tensor) -> Tensor:
    grad, _, grad_strides = _tokens(grad, out_features)
    conv = convolution((out_features, in_features, 1, 1), *_UNIT)
    _native.input_grad(
        conv, ELEMENTS[grad.dtype], (grad.shape[0], in_features, 1, 1), grad.data_ptr(), grad_strides, (1, 1),
        grad_x.data_ptr(), (in_features, 1, 0, 0), pattern[2].data_ptr(), pattern[3].data_ptr(), pattern[4].data_ptr(),
        values.data_ptr(), values.numel(), programs(pattern),
        _linear_threads(values.numel(), grad, grad_x, out_features),
    )  # fmt: skip
    return grad_x


def linear_weight_grad(
    grad, x, pattern, in_features, out_features, value_grad: Tensor, bias_grad: Tensor | None = None
) -> Tensor:
    """`bias_grad` gets the sum of the gradient over the tokens."""
    grad, _, grad_strides = _tokens(grad, out_features)
    x, size, strides = _tokens(x, in_features)
    conv = convolution((out_features, in_features, 1, 1), *_UNIT)
    _native.weight_grad(
        conv, ELEMENTS[x.dtype], size, x.data_ptr(), strides, (1, 1), grad.data_ptr(), grad_strides,
        pattern[0].data_ptr(), pattern[1].data_ptr(), value_grad.data_ptr(), _pointer(bias_grad), value_grad.numel(),
        programs(pattern),
        _linear_threads(value_grad.numel(), x, grad, in_features), None,
    )  # fmt: skip
    return value_grad


def batch_norm(
    x: Tensor, weight, bias, mean, variance, rstd, eps: float, residual, activation: int, measure: bool, y
) -> None:
    """Fills rstd, y (unless it is None) and, to `measure`, mean and variance."""
    n, c, h, w = x.shape
    _native.norm_forward(
        ELEMENTS[x.dtype], x.data_ptr(), _pointer(residual), c, n * h * w, activation, _pointer(weight),
        _pointer(bias), eps, measure, mean.data_ptr(), variance.data_ptr(), rstd.data_ptr(), _pointer(y),
        _threads(4 * x.numel()),
    )  # fmt: skip


def batch_norm_backward(
    grad, x, weight, bias, mean, rstd, residual, output, activation: int, training: bool,
    grad_x, grad_weight, grad_bias, grad_residual,
) -> None:  # fmt: skip
    n, c, h, w = x.shape
    _native.norm_backward(
        ELEMENTS[x.dtype], grad.data_ptr(), x.data_ptr(), _pointer(residual), _pointer(output), c, n * h * w,
        activation, _pointer(weight), _pointer(bias), mean.data_ptr(), rstd.data_ptr(), training, grad_x.data_ptr(),
        grad_residual.data_ptr(), grad_weight.data_ptr(), grad_bias.data_ptr(), _threads(4 * x.numel()),
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
