"""Second-order pruning."""

from ..base import Unsupported
from ..registry import register


@register("OBSPruningModifier")
class OBSPruning(Unsupported):
    """Optimal Brain Surgeon with block-wise Fisher information (oBERT)."""

    source = "Kurtic et al. 2022, arXiv 2203.07259"
    unsupported = "is not supported yet: GMPruningModifier prunes by magnitude"
