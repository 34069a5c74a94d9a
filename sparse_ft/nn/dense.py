"""Dense convolutions beside sparse ones.

A convolution that stays dense (a stem, a layer that would not gain) is fastest in channels_last layout, and so are the
norm and the pooling behind it. Between sparse layers it gets and gives batch-last activations; the change of layout
is made by the native transposes, because torch's own copies of such strides are slow. These classes add that to
the stock ones and nothing else: same parameters, state dict and results.
"""

import functools
import sys

import torch
from torch import Tensor, nn

from sparse_ft.ops import BATCH_LAST, CHANNELS_LAST, is_batch_last


class LayoutConv2d(nn.Conv2d):
    """A dense convolution that chooses its layout."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.device.type != "cpu":
            return super().forward(x)
        if is_batch_last(x) and not x.is_contiguous():
            x = torch.ops.sparse_ft.to_layout(x, CHANNELS_LAST)
            return torch.ops.sparse_ft.to_layout(super().forward(x), BATCH_LAST)
        return super().forward(x.contiguous(memory_format=torch.channels_last))


@functools.cache
def _padding_same(stock: type) -> type:
    """timm's convolution with TensorFlow's padding; timm is loaded by whoever has such a layer."""

    class LayoutConv2dSame(LayoutConv2d, stock):  # type: ignore[misc, valid-type]
        pass

    LayoutConv2dSame.__qualname__ = LayoutConv2dSame.__name__  # pickle finds it by `__getattr__`
    return LayoutConv2dSame


def __getattr__(name: str) -> type:
    if name == "LayoutConv2dSame":
        from timm.layers import Conv2dSame

        return _padding_same(Conv2dSame)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _replacement(kind: type) -> type | None:
    if kind is nn.Conv2d:
        return LayoutConv2d
    timm = sys.modules.get("timm.layers")
    if timm is not None and kind is timm.Conv2dSame:
        return _padding_same(kind)
    return None


def layout_conv(module: nn.Module) -> bool:
    """Let a stock convolution (torch's, timm's Conv2dSame) choose its layout, in place; False for another module."""
    replacement = _replacement(type(module))
    if replacement is not None:
        module.__class__ = replacement
    return replacement is not None


def stock_conv(module: nn.Module) -> None:
    """The inverse of `layout_conv`."""
    if isinstance(module, LayoutConv2d):
        stock = next(kind for kind in type(module).__mro__ if not issubclass(kind, LayoutConv2d))
        module.__class__ = stock  # type: ignore[assignment]
