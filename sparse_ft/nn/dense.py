"""Dense convolutions beside sparse ones.

A convolution that stays dense (a stem, a layer that would not gain) is fastest in channels_last layout, and so are the
norm and the pooling behind it. Between sparse layers it gets and gives batch-last activations; the change of layout
is made by the native transposes, because torch's own copies of such strides are slow.
"""

import torch
from torch import Tensor, nn

from sparse_ft.nn.stock import adapts
from sparse_ft.ops import BATCH_LAST, CHANNELS_LAST, is_batch_last


@adapts("torch.nn", "Conv2d")
@adapts("timm.layers", "Conv2dSame")
class LayoutConv(nn.Module):
    """A dense convolution that chooses its layout."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.device.type != "cpu":
            return super().forward(x)
        if is_batch_last(x) and not x.is_contiguous():
            x = torch.ops.sparse_ft.to_layout(x, CHANNELS_LAST)
            return torch.ops.sparse_ft.to_layout(super().forward(x), BATCH_LAST)
        return super().forward(x.contiguous(memory_format=torch.channels_last))
