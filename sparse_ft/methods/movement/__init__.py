"""Movement pruning: weights go that the training moves towards zero."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..pruning import GradualPruning
from ..registry import register
from ..training import Training

_RATE = 0.01


@register("MovementPruningModifier")
class MovementPruning(GradualPruning):
    """Gradual pruning by movement: a score is -0.01 times the sum of gradient x weight since the start."""

    source = "Sanh et al. 2020, arXiv 2005.07683"

    dense_until_end = True  # it looks at every gradient
    needs_training = True

    _sums: dict[str, Tensor]

    def start(self, training: Training) -> None:
        super().start(training)
        self._sums = {name: torch.zeros_like(target.parameter) for name, target in self.targets.items()}
        self._collected = -1

    def update(self, training: Training) -> None:
        self._collect(training)
        super().update(training)

    def before_step(self, training: Training) -> None:
        self._collect(training)

    @torch.no_grad()
    def _collect(self, training: Training) -> None:
        if self._collected == training.step:
            return
        self._collected = training.step
        for name, target in self.targets.items():
            if target.parameter.grad is not None:
                self._sums[name].addcmul_(target.parameter.grad, target.parameter.detach(), value=-_RATE)

    def scores(self, training: Training) -> dict[str, Tensor]:
        return dict(self._sums)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"sums": getattr(self, "_sums", {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._sums = {name: values.clone() for name, values in state["sums"].items()}
        self._collected = -1
