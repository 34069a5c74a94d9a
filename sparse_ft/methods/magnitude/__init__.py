"""Gradual magnitude pruning: the smallest weights go, more of them at each update."""

from torch import Tensor

from ..fields import FLAG, choice, exactly, field
from ..pruning import GradualPruning
from ..registry import register
from ..training import Training


class _Magnitude(GradualPruning):
    def scores(self, training: Training) -> dict[str, Tensor]:
        return self.sizes()


@register("GMPruningModifier")
class GMPruning(_Magnitude):
    """Gradual magnitude pruning."""

    source = "Zhu & Gupta 2017, arXiv 1710.01878"
    global_sparsity: bool = field(FLAG, False, doc="Older way to write `scope: global`.")
    phased: bool = field(exactly(False, "false: phased pruning is retired"), False, doc="Retired; only false.")
    score_type: str = field(
        choice("magnitude"), "magnitude", doc="Only magnitude: other scores have modifiers of their own."
    )

    def check(self) -> None:
        super().check()
        if self.global_sparsity and self.scope == "erk":
            raise self.wrong("global_sparsity", "contradicts `scope: erk`")

    def budget_scope(self) -> str:
        return "global" if self.global_sparsity else self.scope


@register("MagnitudePruningModifier")
class MagnitudePruning(_Magnitude):
    """Gradual magnitude pruning, layer by layer."""

    source = GMPruning.source


@register("GlobalMagnitudePruningModifier")
class GlobalMagnitudePruning(_Magnitude):
    """Gradual magnitude pruning with one budget for all weights together."""

    source = GMPruning.source
    scope = "global"
