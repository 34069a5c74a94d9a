"""The three memory layouts of a 4-D activation (N, C, H, W).

Sparse convolutions compute in *batch-last* layout: an ordinary tensor with strides (1, H*W*N, W*N, N).
Every tap of a kernel is then a shift by whole runs of N samples, and a channel is one contiguous block.
"""

import torch
from torch import Tensor

from sparse_ft.ops.allocation import empty_strided

LAYOUTS = CONTIGUOUS, CHANNELS_LAST, BATCH_LAST = 0, 1, 2


def batch_last_strides(shape) -> tuple[int, int, int, int]:
    """Strides of a batch-last tensor of `shape` (N, C, H, W)."""
    n, _, h, w = shape
    return (1, h * w * n, w * n, n)


def is_batch_last(x: Tensor) -> bool:
    if x.dim() != 4:
        return False
    have, want = x.stride(), batch_last_strides(x.shape)
    # A dimension of size one has no meaningful stride.
    return have == want or all(size == 1 or h == w for size, h, w in zip(x.shape, have, want, strict=True))


def layout_of(x: Tensor) -> int:
    """The layout to give back to whoever made `x`; a strided view counts as contiguous."""
    if is_batch_last(x):
        return BATCH_LAST
    if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        return CHANNELS_LAST
    return CONTIGUOUS


def empty(shape, layout: int, like: Tensor) -> Tensor:
    """An uninitialised tensor of `shape` in `layout`, with the dtype and device of `like`."""
    if layout == BATCH_LAST:
        return empty_strided(like, tuple(shape), batch_last_strides(shape))
    memory_format = torch.channels_last if layout == CHANNELS_LAST else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=memory_format)
