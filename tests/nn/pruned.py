"""Dense layers with zeros, of every form that has a sparse counterpart."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparse_ft.nn import SparseConv2d, SparseLinear, SparseModule


def zeroed(layer: nn.Module, sparsity: float = 0.8) -> nn.Module:
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand(layer.weight.shape) < sparsity, 0.0)
        if layer.bias is not None:
            layer.bias.normal_()
    return layer


# Name -> (a new dense layer, a new input for it).
FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(20, 12), lambda: torch.randn(7, 20)),
    "linear without bias": (lambda: nn.Linear(20, 12, bias=False), lambda: torch.randn(2, 3, 20)),
    "Conv1D": (lambda: Conv1D(12, 20), lambda: torch.randn(2, 5, 20)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1), lambda: torch.randn(5, 6, 9, 8)),
    "conv without bias": (lambda: nn.Conv2d(6, 8, 1, bias=False), lambda: torch.randn(3, 6, 4, 4)),
    "strided conv": (lambda: nn.Conv2d(6, 8, (3, 5), (2, 3), (1, 2)), lambda: torch.randn(2, 6, 11, 12)),
    "same conv": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same"), lambda: torch.randn(2, 4, 7, 6)),
    "dilated same conv": (
        lambda: nn.Conv2d(4, 6, (2, 4), padding="same", dilation=(3, 1)), lambda: torch.randn(2, 4, 7, 6)
    ),
    "valid conv": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), lambda: torch.randn(2, 4, 7, 6)),
    "grouped conv": (lambda: nn.Conv2d(8, 12, 3, groups=4, dilation=2), lambda: torch.randn(2, 8, 9, 9)),
    "depthwise conv": (lambda: nn.Conv2d(8, 8, 5, padding=2, groups=8), lambda: torch.randn(3, 8, 6, 6)),
}  # fmt: skip


def sparse_of(dense: nn.Module, mask: Tensor | None = None) -> SparseModule:
    kind = SparseConv2d if isinstance(dense, nn.Conv2d) else SparseLinear
    return kind.from_dense(dense, mask)
