"""Activations of which only the largest values are kept, and the dense weight gradient from them.

What is kept takes a bit for every place and four bytes for every value. The weight gradient multiplies the values that
were kept and nothing else; it is that of the dense weight, so pruned weights have one too.

Source: SWAT (Raihan & Aamodt, NeurIPS 2020, arXiv 2001.01969).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_ft.ops import _native, native
from sparse_ft.ops.layout import BATCH_LAST, empty, is_batch_last
from sparse_ft.ops.schema import conv2d_output_shape

_LANES = 8  # samples of a byte
_FLAT_BLOCK = 4096  # samples of a block where neighbouring positions are alike


@dataclass(frozen=True)
class Compact:
    """What was kept of a (N, C, H, W) activation; made by `compact`.

    Attributes:
        bits: uint8, [block][channel][row][column], a byte for eight samples; see csrc/api.h.
        start: int64, where the values of every (block, channel) begin, and their end.
        values: what was kept, in the order of the bits.
        shape: of the activation.
        flat: whether positions count as samples: for a 1x1 convolution without stride or padding, a linear layer.
        column_step: the horizontal stride of the convolution that it is for.
    """

    bits: Tensor
    start: Tensor
    values: Tensor
    shape: tuple[int, ...]
    flat: bool
    column_step: int

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.bits, self.start, self.values))

    def to_dense(self) -> Tensor:
        """The activation with zeros where nothing was kept, in batch-last layout."""
        x = empty(self.shape, BATCH_LAST, self.values)
        size, lanes = _sizes(self.shape, self.flat, self.column_step)
        _native.compact_expand(
            size, lanes, self.bits.data_ptr(), self.start.data_ptr(), self.values.data_ptr(), x.data_ptr(),
            _strides(self.shape, self.flat), native._threads(2 * x.numel()),
        )  # fmt: skip
        return x


def _sizes(shape, flat: bool, column_step: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """(blocks, channels, rows, columns) of bytes; samples (all, of a block, of a column) and the step of columns."""
    n, c, h, w = shape
    if not flat:
        return (-(-n // _LANES), c, h, w), (n, _LANES, 0, column_step)
    samples = n * h * w
    block = min(_FLAT_BLOCK, -(-samples // _LANES) * _LANES)
    return (-(-samples // block), c, 1, block // _LANES), (samples, block, _LANES, 1)


def _strides(shape, flat: bool) -> tuple[int, int, int, int]:
    """(sample, channel, row, column) of a batch-last activation, as its compact form has them."""
    n, _, h, w = shape
    return (1, h * w * n, 0, _LANES) if flat else (1, h * w * n, w * n, n)


def nth_magnitude(x: Tensor, n: int) -> float:
    """The n-th largest absolute value, from 0."""
    if native.native_reason(weights=(x,)):
        return float(x.detach().abs().flatten().kthvalue(x.numel() - n).values)
    x = x if is_batch_last(x) else x.contiguous()  # the order does not matter
    return _native.nth_magnitude(x.data_ptr(), x.numel(), n, native._threads(4 * x.numel()))


def largest_mask(x: Tensor, keep: int) -> Tensor:
    """bool, True for the `keep` largest absolute values; of equal ones the first in row-major order."""
    if native.native_reason(weights=(x,)):
        order = x.detach().abs().flatten().sort(descending=True, stable=True).indices
        return (
            torch.zeros(x.numel(), dtype=torch.bool, device=x.device).index_fill_(0, order[:keep], True).view(x.shape)
        )
    x = x.detach().contiguous()
    mask = torch.empty(x.shape, dtype=torch.bool)
    _native.mask_largest(x.data_ptr(), x.numel(), keep, mask.data_ptr(), native._threads(4 * x.numel()))
    return mask


def compact(x: Tensor, threshold: float, *, flat: bool, column_step: int = 1) -> Compact:
    """Keeps the values of a batch-last float32 activation on CPU whose magnitude is above a threshold, and NaN."""
    if not is_batch_last(x) or native.native_reason(weights=(x,)):
        raise ValueError(f"compact takes a batch-last float32 tensor on CPU, not {x.dtype} with strides {x.stride()}")
    shape = tuple(x.shape)
    size, lanes = _sizes(shape, flat, column_step)
    stride, threads = _strides(shape, flat), native._threads(2 * x.numel())
    bits = torch.empty(size, dtype=torch.uint8)
    start = torch.zeros(size[0] * size[1] + 1, dtype=torch.int64)
    _native.compact_bits(size, lanes, x.data_ptr(), stride, threshold, bits.data_ptr(), start[1:].data_ptr(), threads)
    torch.cumsum(start, 0, out=start)
    values = torch.empty(int(start[-1]))
    _native.compact_values(
        size, lanes, bits.data_ptr(), start.data_ptr(), x.data_ptr(), stride, values.data_ptr(), threads
    )
    return Compact(bits, start, values, shape, flat, column_step)


def weight_grad(kept: Compact, grad: Tensor, weight_shape, stride, padding, dilation, groups) -> tuple[Tensor, int]:
    """The dense weight's gradient, and how many multiply-adds it took.

    Args:
        kept: of the convolution's input, with its `column_step`.
        grad: of its output, batch-last (N, O, OH, OW).
        Others: of the convolution; padding is (top, left, bottom, right).

    Raises:
        ValueError: for a gradient of another shape or layout.
    """
    conv = (tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)
    shape = conv2d_output_shape(kept.shape, *conv)
    if tuple(grad.shape) != shape or not is_batch_last(grad) or native.native_reason(weights=(grad,)):
        raise ValueError(f"the gradient must be batch-last float32 of shape {shape}, got {tuple(grad.shape)}")
    if not kept.flat and kept.column_step != conv[1][1]:
        raise ValueError(f"the activation is kept for a stride of {kept.column_step}, not {conv[1][1]}")
    if kept.values.numel() == 0 or grad.numel() == 0:
        return grad.new_zeros(conv[0]), 0
    out = grad.new_empty(conv[0])
    size, lanes = _sizes(kept.shape, kept.flat, kept.column_step)
    position = (1, size[3]) if kept.flat else shape[2:]
    operations = 2 * kept.values.numel() * conv[0][0] * conv[0][2] * conv[0][3]
    count = _native.compact_gradient(
        native.convolution(*conv), size, lanes, kept.bits.data_ptr(), kept.start.data_ptr(), kept.values.data_ptr(),
        position, grad.data_ptr(), _strides(shape, kept.flat), out.data_ptr(),
        native._threads(grad.numel(), operations),
    )  # fmt: skip
    return out, count
