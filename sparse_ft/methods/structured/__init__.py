"""Whole filters and channels."""

from typing import Any

from torch import Tensor

from ..fields import NOTHING, choice, field
from ..pruning import GradualPruning
from ..registry import register
from ..targets import ALL_PRUNABLE, TARGETS
from ..training import Training


@register("StructuredPruningModifier")
class StructuredPruning(GradualPruning):
    """Gradual pruning of whole filters (output channels) or input channels, by the mean size of their weights.

    Filters are masked: shapes stay. Biases and norms of a pruned filter are not touched.
    """

    source = "Li et al. 2017, arXiv 1608.08710"
    params: Any = field(TARGETS, ALL_PRUNABLE, doc="The weights.")
    mask_type: str = field(choice("filter", "channel"), "filter", doc="Output (filter) or input channels.")
    param_groups: Any = field(NOTHING, None, doc="Only none: filters that go together are not supported.")

    def scores(self, training: Training) -> dict[str, Tensor]:
        return self.sizes()
