"""What dynamic sparse training methods share: the number of weights stays, their places move."""

import math

import torch
from torch import Tensor

from sparse_ft.masks.prune import keep_highest

from .base import Bounded
from .clock import Clock
from .fields import EPOCH, FLAG, choice, exactly, field, number
from .pruning import SPARSITY, MaskedTargets
from .targets import Target
from .training import Training

_SCOPES = {"uniform": "uniform", "erdos_renyi_kernel": "erk", "erdos_renyi": "erk", "global": "global"}


class DynamicSparsity(MaskedTargets, Bounded):
    """Sparse from the start; at each update the smallest weights are dropped, and as many others begin from zero.

    The share that moves falls to nothing on half a cosine. Sub-classes say which weights grow (`growth`).
    """

    periodic = True
    completes = True

    final_sparsity: float = field(SPARSITY, unit="fraction of zeros", doc="Sparsity from the start on.")
    update_frequency: float = field(number(0, above=True), unit="epochs", doc="Between two moves.")
    init_update_fraction: float = field(
        number(0, 1), 0.3, doc="Share of each layer's weights that the first move drops and grows."
    )
    sparsity_strategy: str = field(
        choice(*_SCOPES),
        "erdos_renyi_kernel",
        doc="Every weight alike (uniform), more in larger layers, or one budget.",
    )
    end_epoch: float = field(EPOCH, unit="epochs", doc="After its last move; about 3/4 of the training is usual.")
    global_sparsity: bool = field(exactly(False, "false: see sparsity_strategy"), False, doc="Only false.")
    leave_enabled: bool = field(FLAG, True, doc="Keep the last mask after the end.")
    momentum_buffer_reset: bool = field(FLAG, True, doc="Without effect: weights that grow have no momentum anyhow.")
    mask_type: str = field(choice("unstructured"), "unstructured", doc="Only unstructured.")

    targets: dict[str, Target]

    def start(self, training: Training) -> None:
        self.begin(training)
        masks = self.masks_by_size(self.final_sparsity, scope=_SCOPES[self.sparsity_strategy])
        training.masks.hold(self.owner, self.targets, training.agree(masks))

    @torch.no_grad()
    def update(self, training: Training) -> None:
        if not self.phase.started:
            return
        training.refuse_native(self.targets)
        progress = training.clock.progress(self.timing, training.step)
        share = self.init_update_fraction / 2 * (1 + math.cos(math.pi * progress))
        current = training.masks.of(self.owner)
        moved = {name: self._move(training, name, mask, share) for name, mask in current.items()}
        training.masks.hold(self.owner, self.targets, training.agree(moved))

    def _move(self, training: Training, name: str, mask: Tensor, share: float) -> Tensor:
        """The mask with `share` of its weights in other places; a weight that is dropped may grow again at once."""
        weight = self.targets[name].parameter.detach()
        count = min(round(share * int(mask.sum())), int((~mask).sum()))
        if count == 0:
            return mask
        pruned = int((~mask).sum())
        by_size = weight.abs().float().masked_fill(~mask, -torch.inf)
        stays = keep_highest(by_size.flatten(), pruned + count).view_as(mask)
        by_growth = self.growth(training, name).float().masked_fill(stays, torch.inf)
        return keep_highest(by_growth.flatten(), pruned).view_as(mask)

    def growth(self, training: Training, name: str) -> Tensor:
        """How much each weight should grow; the highest do."""
        raise NotImplementedError

    def end(self, training: Training) -> None:
        if not self.leave_enabled:
            training.masks.release(self.owner, at_once=training.sparseml)

    def preview(self, clock: Clock, step: int) -> dict[str, float]:
        return {"sparsity": self.final_sparsity}
