"""Operators: their schemas with shape rules and gradients, and the two backends that compute them."""

from sparse_ft.ops import gradients as _gradients  # noqa: F401  registers torch.ops.sparse_ft
from sparse_ft.ops.activations import Activation
from sparse_ft.ops.layout import BATCH_LAST, CHANNELS_LAST, CONTIGUOUS, batch_last_strides, is_batch_last, layout_of
from sparse_ft.ops.native import activate_isa, active_isa, available_isas, native_reason
from sparse_ft.ops.pattern import SparsePattern

__all__ = [
    "Activation",
    "BATCH_LAST",
    "CHANNELS_LAST",
    "CONTIGUOUS",
    "SparsePattern",
    "activate_isa",
    "active_isa",
    "available_isas",
    "batch_last_strides",
    "is_batch_last",
    "layout_of",
    "native_reason",
]
