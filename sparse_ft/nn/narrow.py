"""Dense convolutions with few channels on the native kernels.

oneDNN computes with blocks of 16 channels: 5 of them cost what 8 cost, 19 what 32. The native kernels have a batch's
samples in a vector's lanes, so that a weight without any zeros costs what it has in operations, however many channels
there are; and norms, activations and additions around them work in batch-last layout, in few passes (see norm.py).
"""

import functools

import torch
from torch import Tensor, nn

from sparse_ft.nn.conv import padding_of
from sparse_ft.nn.dense import LayoutConv
from sparse_ft.nn.stock import follow_layout
from sparse_ft.ops import BATCH_LAST, is_batch_last, native_reason
from sparse_ft.ops.gradients import conv2d, to_layout
from sparse_ft.ops.pattern import SparsePattern

WIDEST = 64  # channels; wider convolutions are faster in oneDNN, and what lies between two of them is channels_last
LANES = 16  # samples of a batch in a vector


class NarrowConv(LayoutConv):
    """A convolution on the native kernels while it has few channels."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if (
            x.dim() != 4
            or max(weight.shape[:2]) > WIDEST
            or self.padding_mode != "zeros"
            or native_reason(x, weight, self.bias) is not None
        ):
            return super().forward(x)
        if not is_batch_last(x):
            x = to_layout(x, BATCH_LAST)
        padding = padding_of(self)
        shape, values = tuple(weight.shape), weight.reshape(-1, 1)
        pattern = _full(shape, self.stride, padding[:2], self.dilation, self.groups)
        return conv2d(x, values, self.bias, pattern, shape, self.stride, padding, self.dilation, self.groups)


@functools.lru_cache(maxsize=128)
def _full(shape: tuple[int, ...], stride, padding, dilation, groups: int) -> list[Tensor]:
    """The pattern of a weight without zeros."""
    with torch.inference_mode(False):  # training may use it later
        ones = torch.ones(shape)
        pattern, _ = SparsePattern.build(ones, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return pattern.tensors


@functools.cache
def _narrow(stock: type) -> type:
    return type(f"Narrow{stock.__name__}", (NarrowConv, stock), {"__module__": __name__})


def suits_native(images: Tensor) -> bool:
    """Whether a network gains by computing its narrow convolutions on these images natively."""
    return (
        images.dim() == 4
        and len(images) >= LANES
        and native_reason(images) is None
        and not torch.is_autocast_enabled("cpu")
    )


def compute_narrowly(module: nn.Module) -> None:
    """Adapts a stock module in place, as `follow_layout` does, but for narrow convolutions; `restore_stock` does not
    take it back: set its class to what it was."""
    if type(module) is nn.Conv2d:
        module.__class__ = _narrow(nn.Conv2d)
    else:
        follow_layout(module)
