"""Layers: sparse linear and convolution, norms that keep batch-last layout, frozen masks of dense layers."""

from sparse_ft.nn.conv import SparseConv2d
from sparse_ft.nn.dense import LayoutConv2d, layout_conv, stock_conv
from sparse_ft.nn.frozen import FrozenMasks, freeze_masks
from sparse_ft.nn.linear import SparseLinear, is_transformers_conv1d
from sparse_ft.nn.module import SparseModule
from sparse_ft.nn.norm import BatchLastBatchNorm2d, batch_last_norm, stock_norm

__all__ = [
    "BatchLastBatchNorm2d",
    "FrozenMasks",
    "LayoutConv2d",
    "SparseConv2d",
    "SparseLinear",
    "SparseModule",
    "batch_last_norm",
    "freeze_masks",
    "is_transformers_conv1d",
    "layout_conv",
    "stock_conv",
    "stock_norm",
]
