"""AC/DC: training alternates between a sparse and a dense network."""

import math
from typing import Any

import torch

from sparse_ft.masks.budgets import SCOPES
from sparse_ft.optimizer_state import clear

from ..base import Scheduled
from ..clock import Clock
from ..fields import FLAG, NEVER, NOTHING, choice, either, field, number
from ..pruning import SPARSITY, STRUCTURE, MaskedTargets
from ..registry import register
from ..training import Training


@register("ACDCPruningModifier")
class ACDCPruning(MaskedTargets, Scheduled):
    """Alternating compressed and decompressed phases of equal length, dense first and sparse last.

    A sparse phase keeps the largest weights of its beginning; a dense one lets all train, pruned weights from zero.
    """

    source = "Peste et al. 2021, arXiv 2106.12379"
    periodic = True
    completes = True

    compression_sparsity: float = field(SPARSITY, unit="fraction of zeros", doc="Sparsity of the sparse phases.")
    update_frequency: float = field(number(0, above=True), unit="epochs", doc="Length of a phase.")
    global_sparsity: bool = field(FLAG, True, doc="One budget for all weights together, or every weight alike.")
    scope: Any = field(
        either(choice(*SCOPES), NOTHING), None, doc="uniform, erk or global; goes before `global_sparsity`."
    )
    leave_enabled: bool = field(
        FLAG, True, doc="Keep the mask after the end. Otherwise pruned weights may train again from the next step on."
    )
    momentum_buffer_reset: bool = field(
        FLAG, True, doc="Begin a dense phase with zero momentum, of all weights; that of pruned ones is zero anyhow."
    )
    mask_type: str = field(STRUCTURE, "unstructured", doc="What is pruned together.")

    def check(self) -> None:
        super().check()
        if self.end_epoch == NEVER:
            raise self.wrong("end_epoch", "must be the epoch at which the last sparse phase ends, not -1")

    def is_sparse(self, clock: Clock, step: int) -> bool:
        """Whether a step is in a sparse phase; a dense phase that would be the last is sparse as well."""
        if self.one_shot:
            return True
        length = clock.number(self.update_frequency)
        phase = clock.elapsed(self.timing, step) // length
        whole = clock.number(self.end_epoch) - max(clock.number(self.start_epoch), 0)
        last = max(0, math.ceil(whole / length) - 1)
        return phase >= last or phase % 2 == 1

    def start(self, training: Training) -> None:
        self.attach(training)
        self.warn_of_unusual(training)
        self._sparse = False

    @torch.no_grad()
    def update(self, training: Training) -> None:
        sparse = self.is_sparse(training.clock, training.step)
        if sparse != self._sparse:
            training.refuse_native(self.targets)
        if sparse and not self._sparse:
            scope = self.scope or ("global" if self.global_sparsity else "uniform")
            masks = self.masks_by_size(self.compression_sparsity, scope=scope, structure=self.mask_type)
            training.masks.hold(self.owner, self.targets, training.agree(masks))
        elif self._sparse and not sparse:
            training.masks.release(self.owner, at_once=True)
            if self.momentum_buffer_reset and not training.sparseml:
                for target in self.targets.values():
                    clear(training.optimizer, target.parameter)
        self._sparse = sparse

    def wants_dense_gradients(self, training: Training, step: int) -> bool:
        # The first step of a dense phase moves all weights already.
        return self._sparse and not self.is_sparse(training.clock, step)

    def end(self, training: Training) -> None:
        if not self.leave_enabled:
            training.masks.release(self.owner, at_once=training.sparseml)

    def state_dict(self) -> dict[str, Any]:
        return {"sparse": self._sparse} if hasattr(self, "_sparse") else {}

    def load_state_dict(self, state) -> None:
        if "sparse" in state:
            self._sparse = bool(state["sparse"])

    def preview(self, clock: Clock, step: int) -> dict[str, float]:
        return {"sparsity": self.compression_sparsity if self.is_sparse(clock, step) else 0.0}
