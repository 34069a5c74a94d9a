"""Dense convolutions beside sparse ones.

A convolution that stays dense (a stem, a layer that would not gain) is fastest in channels_last layout; norms, pooling
and the sparse layers around it work in batch-last layout. So it takes what it is given to the one and gives the
other, by the native transposes, because torch's own copies of such strides are slow. With one layout everywhere else,
no sum of gradients is one of two layouts, which is slow and gives a result that has to be copied once more.
"""

import torch
from torch import Tensor, nn

from sparse_ft.nn.module import in_autocast_dtype
from sparse_ft.nn.stock import adapts
from sparse_ft.ops import BATCH_LAST, CHANNELS_LAST, is_batch_last, native_reason
from sparse_ft.ops.gradients import to_layout


def survives_channels_last(conv: nn.Conv2d) -> bool:
    """Whether torch can compute the gradients of a convolution in channels_last layout.

    Its oneDNN (torch 2.14) reads beyond its memory in the backward pass of a strided 1x1 convolution of fewer than 16
    input channels, which ends the process; in contiguous layout it does not.
    """
    strided = max(conv.stride) > 1 and max(conv.kernel_size) == 1
    return not (strided and conv.in_channels // conv.groups < 16)


@adapts("torch.nn", "Conv2d")
@adapts("timm.layers", "Conv2dSame")
class LayoutConv(nn.Module):
    """A dense convolution: channels_last inside, where torch can do it, and batch-last outside."""

    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or native_reason(x, weights=(self.weight,)) is not None:
            return super().forward(x)
        x = in_autocast_dtype(x)
        if is_batch_last(x) and not x.is_contiguous():
            x = to_layout(x, CHANNELS_LAST)
        inside = torch.channels_last if survives_channels_last(self) else torch.contiguous_format  # type: ignore[arg-type]
        y = super().forward(x.contiguous(memory_format=inside))
        if native_reason(y) is not None or is_batch_last(y):
            return y
        return to_layout(y, BATCH_LAST)
