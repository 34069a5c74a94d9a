"""Sparse linear layer."""

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparse_ft.nn.module import SparseModule, in_autocast_dtype, parameter_of
from sparse_ft.ops import SparsePattern
from sparse_ft.ops.gradients import linear

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether this is the linear layer of GPT-2 and its kin, which stores its weight as (in, out)."""
    library = sys.modules.get("transformers.pytorch_utils")  # no such layer exists before that is imported
    return library is not None and isinstance(module, library.Conv1D)


class SparseLinear(SparseModule):
    """y = x Wᵀ + b with a sparse W, computing with its nonzeros only, forward and backward.

    Input (..., in_features), output (..., out_features). Made from a dense layer by `from_dense`.

    Source: SparseProp (Nikdan et al., ICML 2023).
    """

    def __init__(self, pattern: SparsePattern, values: Tensor, bias: Tensor | None, like: Tensor):
        super().__init__()
        self.out_features, self.in_features = pattern.shape
        self._set_weight(pattern, values, bias, like)

    @classmethod
    def from_dense(cls, linear: "nn.Linear | Conv1D", mask: Tensor | None = None) -> "SparseLinear":
        """A sparse layer with the nonzeros of `linear` (or the positions of `mask`, in the weight's shape).

        transformers' Conv1D, whose weight is (in, out), becomes one too; its state dict keeps that shape.
        The bias is shared with `linear`.
        """
        transposed = is_transformers_conv1d(linear)
        weight = linear.weight
        oriented = weight.detach().t() if transposed else weight.detach()
        if mask is not None and transposed:
            mask = mask.t()
        pattern, values = SparsePattern.build(oriented, mask)
        layer = cls(pattern, values, linear.bias, weight)
        layer.stored_transposed = transposed
        return layer.train(linear.training)

    def to_dense(self) -> "nn.Linear | Conv1D":
        """The exact dense layer (Conv1D if it was one); the bias is shared."""
        with torch.device("meta"):  # the parameters are put in below
            if self.stored_transposed:
                from transformers.pytorch_utils import Conv1D

                dense: nn.Linear | Conv1D = Conv1D(self.out_features, self.in_features)
            else:
                dense = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        dense.weight = nn.Parameter(self.dense_weight(), requires_grad=self.weight.requires_grad)
        dense.bias = self.bias  # type: ignore[assignment]  # torch's Linear declares its None no more than this
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        x = in_autocast_dtype(x)
        self._before_forward(x)
        values, bias = parameter_of(self, "weight"), parameter_of(self, "bias")
        return linear(x, values, bias, self.pattern.tensors, self.in_features, self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"sparsity={self.sparsity:.4f}"
        )
