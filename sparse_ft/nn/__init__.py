"""Layers: sparse linear and convolution, stock modules that follow their layout, frozen masks of dense layers."""

from sparse_ft.nn.conv import SparseConv2d
from sparse_ft.nn.dense import LayoutConv, survives_channels_last
from sparse_ft.nn.dropout import NativeDropout
from sparse_ft.nn.frozen import FrozenMasks, freeze_masks
from sparse_ft.nn.linear import SparseLinear, is_transformers_conv1d
from sparse_ft.nn.module import SparseModule
from sparse_ft.nn.norm import LayoutNorm, LayoutNormAct
from sparse_ft.nn.pooling import LayoutAdaptiveAvgPool, LayoutAvgPool, LayoutMaxPool
from sparse_ft.nn.squeeze import LayoutSqueeze
from sparse_ft.nn.stock import follow_layout, restore_stock, stock_type
from sparse_ft.nn.varying import VaryingConv, compute_varying, suits_varying

__all__ = [
    "FrozenMasks",
    "LayoutAdaptiveAvgPool",
    "LayoutAvgPool",
    "LayoutConv",
    "LayoutMaxPool",
    "LayoutNorm",
    "LayoutNormAct",
    "LayoutSqueeze",
    "NativeDropout",
    "SparseConv2d",
    "SparseLinear",
    "SparseModule",
    "VaryingConv",
    "compute_varying",
    "follow_layout",
    "freeze_masks",
    "is_transformers_conv1d",
    "restore_stock",
    "stock_type",
    "suits_varying",
    "survives_channels_last",
]
