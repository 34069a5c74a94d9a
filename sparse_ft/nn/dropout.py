"""Dropout beside sparse layers. torch draws its mask number by number on one core, and keeps it for backward."""

import torch
from torch import Tensor, nn

from sparse_ft.nn.deferred import Deferred, result_of
from sparse_ft.nn.stock import adapts
from sparse_ft.ops import calls, native_reason
from sparse_ft.ops.gradients import dropout

FEWEST_VALUES = 8192  # with fewer, torch's own is as fast or faster


@adapts("torch.nn", "Dropout", everywhere=True)
class NativeDropout(nn.Dropout):
    """torch's dropout with other random numbers: those of a seed that torch's generator gives for every call."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and 0.0 < self.p < 1.0) or self.inplace:
            return super().forward(x)
        if type(x) is Deferred:
            x = result_of(x)
        if not _suits(x):
            return super().forward(x)
        return dropout(x, self.p, int(torch.empty((), dtype=torch.int64).random_()))


def _suits(x: Tensor) -> bool:
    # Elements are counted in the order of a contiguous tensor: other layouts would be copied.
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.numel() >= FEWEST_VALUES
        and x.is_contiguous()
        and native_reason(x) is None
        and not calls.transformed()
    )
