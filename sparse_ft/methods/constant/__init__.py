"""Frozen masks: the zeros that a model has stay zero."""

import logging

from ..base import Scheduled
from ..fields import EPOCH, FLAG, NEVER, field
from ..pruning import MaskedTargets
from ..registry import register
from ..targets import is_native
from ..training import Training

logger = logging.getLogger(__name__)


@register("ConstantPruningModifier")
class ConstantPruning(MaskedTargets, Scheduled):
    """Keeps the zeros: sparse transfer learning. The mask is that of the start; weights without a zero train freely.

    A weight that is all zeros is left alone: a new classifier or adapter starts so.
    """

    source = "Iofinova et al. 2022, arXiv 2111.13445"
    start_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="When it begins; -1 for at once.")
    end_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="When it ends; -1 for never.")
    update_frequency: float = field(EPOCH, NEVER, unit="epochs", doc="Without effect; old recipes have it.")
    leave_enabled: bool = field(
        FLAG, True, doc="Keep the mask after the end. Otherwise pruned weights may train again from the next step on."
    )

    def start(self, training: Training) -> None:
        self.attach(training)
        # Of a native sparse layer the mask is its pattern.
        dense = {name: target for name, target in self.targets.items() if not is_native(target)}
        masks = {name: target.parameter.detach() != 0 for name, target in dense.items()}
        empty = [name for name, mask in masks.items() if not mask.any()]
        if empty and not training.sparseml:
            logger.info("%s leaves %s alone: all its weights are zero", self.type_name, ", ".join(empty))
            masks = {name: mask for name, mask in masks.items() if name not in empty}
        pruned = {name: mask for name, mask in masks.items() if not mask.all() or training.sparseml}
        training.masks.hold(self.owner, self.targets, training.agree(pruned) if pruned else pruned)

    def before_step(self, training: Training) -> None:
        if training.sparseml:  # which freezes whatever happens to be zero now
            dense = {name: target for name, target in self.targets.items() if not is_native(target)}
            masks = {name: target.parameter.detach() != 0 for name, target in dense.items()}
            training.masks.hold(self.owner, self.targets, masks)

    def end(self, training: Training) -> None:
        if training.sparseml or not self.leave_enabled:
            training.masks.release(self.owner, at_once=training.sparseml)
