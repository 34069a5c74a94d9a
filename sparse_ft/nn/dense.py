"""Dense convolutions beside sparse ones.

A convolution that stays dense (a stem, a layer that would not gain) is fastest in channels_last layout, and so are the
norm and the pooling behind it. Between sparse layers it gets and gives batch-last activations; the change of layout
is made by the native transposes, because torch's own copies of such strides are slow. This class adds that to
nn.Conv2d and nothing else: same parameters, state dict and results.
"""

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


def layout_conv(module: nn.Module) -> bool:
    """Let a stock nn.Conv2d choose its layout, in place; False if the module is not one."""
    if type(module) is not nn.Conv2d:
        return False
    module.__class__ = LayoutConv2d
    return True


def stock_conv(module: nn.Module) -> None:
    """The inverse of `layout_conv`."""
    if type(module) is LayoutConv2d:
        module.__class__ = nn.Conv2d  # type: ignore[assignment]
