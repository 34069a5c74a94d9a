"""Memory for what operators give back.

In glibc a freed block from `posix_memalign`, by which torch allocates, does not fit the next request of the same size,
and the heap of a training step grows to about twice what is in use at its peak. Large results have blocks of the
native core's own, which are found again.
"""

import math

import torch
from torch import Tensor, nn

from sparse_ft.ops import _native

_LARGE = 2**20  # bytes

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1}  # as csrc/api.h numbers what activations are stored as


def empty_strided(like: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """An uninitialised dense tensor with the dtype and device of `like`.

    It counts its versions in inference mode as well: who computes later than asked sees whether it has changed.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return empty_strided(like, shape, strides)
    if (
        type(like) in (Tensor, nn.Parameter)
        and like.dtype in ELEMENTS
        and like.device.type == "cpu"
        and math.prod(shape) * like.element_size() >= _LARGE
        and not torch._C._len_torch_dispatch_stack()
    ):
        return _native.block(ELEMENTS[like.dtype], shape, strides)
    return like.new_empty_strided(shape, strides)


def empty(like: Tensor, *shape: int) -> Tensor:
    """The same for a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return empty_strided(like, shape, tuple(reversed(strides)))
