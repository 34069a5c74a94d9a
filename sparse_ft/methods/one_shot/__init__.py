"""Pruning at one go."""

import torch

from sparse_ft.masks.budgets import SCOPES
from sparse_ft.masks.structures import parse_structure

from ..base import Modifier
from ..clock import Clock
from ..fields import EPOCH, NEVER, choice, field
from ..pruning import SPARSITY, STRUCTURE, MaskedTargets
from ..registry import register
from ..training import Training


@register("OneShotPruningModifier")
class OneShotPruning(MaskedTargets, Modifier):
    """Prunes by magnitude at one step, and keeps the mask from then on."""

    source = "Han et al. 2015, arXiv 1506.02626"
    completes = True

    sparsity: float = field(SPARSITY, unit="fraction of zeros", doc="The sparsity.")
    start_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="When; -1 for at once.")
    mask_type: str = field(STRUCTURE, "unstructured", doc="What is pruned together.")
    scope: str = field(choice(*SCOPES), "uniform", doc="How the budget is shared: uniform, erk or global.")

    def check(self) -> None:
        fixed = parse_structure(self.mask_type).sparsity
        if fixed is not None and abs(self.sparsity - fixed) > 0.01:
            raise self.wrong("sparsity", f"must be {fixed:g}, which mask_type {self.mask_type!r} fixes")

    @torch.no_grad()
    def start(self, training: Training) -> None:
        self.begin(training)
        masks = self.masks_by_size(self.sparsity, scope=self.scope, structure=self.mask_type)
        training.masks.hold(self.owner, self.targets, training.agree(masks))

    def preview(self, clock: Clock, step: int) -> dict[str, float]:
        return {"sparsity": self.sparsity}
