"""Dense convolutions whose numbers of channels change from step to step.

oneDNN computes with blocks of 16 channels (5 of them cost what 8 cost, 19 what 32) and generates code for every shape
that it has not seen lately, which takes as long as a small convolution. The native kernels have a batch's samples in
a vector's lanes, so that a weight without any zeros costs what it has in operations, however many channels there are;
and norms, activations and additions around them work in batch-last layout, in few passes (see norm.py). So
convolutions with few channels compute natively, and the others in oneDNN with zeros up to the next 16 channels.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparse_ft.nn.conv import padding_of
from sparse_ft.nn.dense import LayoutConv
from sparse_ft.nn.stock import follow_layout
from sparse_ft.ops import BATCH_LAST, CHANNELS_LAST, is_batch_last, native_reason
from sparse_ft.ops.gradients import conv2d, to_layout
from sparse_ft.ops.layout import empty
from sparse_ft.ops.native import as_batch_last
from sparse_ft.ops.pattern import SparsePattern

WIDEST = 64  # channels of a convolution on the native kernels; oneDNN is faster at wider ones
BLOCK = 16  # channels that oneDNN computes together
LANES = 16  # samples of a batch in a vector


class VaryingConv(LayoutConv, nn.Conv2d):  # type: ignore[misc]  # what `weight` is to each
    """A convolution in a network whose layers have other numbers of channels at every step."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.dim() != 4 or self.padding_mode != "zeros" or native_reason(weights=(x, weight, self.bias)) is not None:
            return super().forward(x)
        if not is_batch_last(x):
            x = to_layout(x, BATCH_LAST)
        padding = padding_of(self)
        if max(weight.shape[:2]) <= WIDEST:
            shape, values = tuple(weight.shape), weight.reshape(-1, 1)
            pattern = _full(shape, self.stride, padding[:2], self.dilation, self.groups)
            return conv2d(x, values, self.bias, pattern, shape, self.stride, padding, self.dilation, self.groups)
        if self.groups > 1 or padding[:2] != padding[2:]:
            return super().forward(x)
        x = x.view_as(x)  # not one whose norm is still to be computed
        return _InBlocks.apply(x, weight, self.bias, self.stride, padding[:2], self.dilation)


class _InBlocks(torch.autograd.Function):
    """A convolution of whole blocks of channels, zeros at their end, from batch-last to batch-last layout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation) -> Tensor:
        ctx.sizes, ctx.geometry = weight.shape[:2], (stride, padding, dilation, False, (0, 0), 1)
        made, read = ctx.sizes
        weight = F.pad(weight, (0, 0, 0, 0, 0, _missing(read), 0, _missing(made)))
        bias = None if bias is None else F.pad(bias, (0, _missing(made)))
        x = _from_batch_last(x)
        ctx.save_for_backward(x, weight)
        y = torch.convolution(x, weight, bias, *ctx.geometry)
        return to_layout(y, BATCH_LAST)[:, :made]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        made, read = ctx.sizes
        whole = _from_batch_last(as_batch_last(grad))
        needed = ctx.needs_input_grad[:3]
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            whole, x, weight, [len(weight)], *ctx.geometry, needed
        )
        if grad_x is not None:
            grad_x = to_layout(grad_x, BATCH_LAST)[:, :read]
        if grad_weight is not None:
            grad_weight = grad_weight[:made, :read]
        return grad_x, grad_weight, None if grad_bias is None else grad_bias[:made], None, None, None


def _missing(channels: int) -> int:
    """To the next whole block."""
    return -channels % BLOCK


def _from_batch_last(x: Tensor) -> Tensor:
    """Channels-last, with whole blocks of channels."""
    count, channels, height, width = x.shape
    if _missing(channels):
        whole = empty((count, channels + _missing(channels), height, width), BATCH_LAST, x)
        whole[:, :channels].copy_(x)
        whole[:, channels:].zero_()
        x = whole
    return to_layout(x, CHANNELS_LAST)


@functools.lru_cache(maxsize=128)
def _full(shape: tuple[int, ...], stride, padding, dilation, groups: int) -> list[Tensor]:
    """The pattern of a weight without zeros."""
    with torch.inference_mode(False):  # training may use it later
        ones = torch.ones(shape)
        pattern, _ = SparsePattern.build(ones, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return pattern.tensors


def suits_varying(images: Tensor) -> bool:
    """Whether a network gains by `compute_varying` on a batch of these images."""
    return (
        images.dim() == 4
        and len(images) >= LANES
        and native_reason(weights=(images,)) is None
        and not torch.is_autocast_enabled("cpu")
    )


def compute_varying(module: nn.Module) -> None:
    """Adapts a stock module in place for numbers of channels that change, others as `follow_layout` does.

    To take it back, give the module the class that it had.
    """
    if type(module) is nn.Conv2d:
        module.__class__ = VaryingConv
    else:
        follow_layout(module)
