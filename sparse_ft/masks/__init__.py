"""Scores, budgets, structures and the masks they give: tensor functions and walks over a model's layers."""

from .names import match_names
from .prune import compute_masks, masks_from_scores, prune
from .sparsity import LayerSparsity, SparsityReport, mask_state, sparsity
from .targets import PrunableLayers, prunable_layers

__all__ = [
    "LayerSparsity",
    "PrunableLayers",
    "SparsityReport",
    "compute_masks",
    "mask_state",
    "masks_from_scores",
    "match_names",
    "prunable_layers",
    "prune",
    "sparsity",
]
