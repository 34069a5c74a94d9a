"""RigL: weights grow where the gradient is largest."""

from typing import Any

import torch
from torch import Tensor

from ..dynamic import DynamicSparsity
from ..fields import MAPPING, field, integer
from ..registry import register
from ..training import Training


@register("RigLPruningModifier")
class RigL(DynamicSparsity):
    """Dynamic sparse training from scratch: small weights are dropped, and those with the largest gradients grow.

    Gradients of pruned weights are computed only at the steps before an update that look at them, and are hidden from
    the optimizer and from gradient clipping.
    """

    source = "Evci et al. 2020, arXiv 1911.11134"
    num_grads: int = field(integer(1), 1, unit="steps", doc="How many steps' gradients are summed for an update.")
    grad_sampler_kwargs: Any = field(MAPPING, {}, doc="Without effect: gradients are those of the training itself.")

    _sums: dict[str, Tensor]

    def start(self, training: Training) -> None:
        super().start(training)
        self._sums = {}

    def watches_gradients(self, training: Training, step: int) -> bool:
        coming = range(step, step + self.num_grads)
        return any(training.clock.event(self.timing, self.phase, later).updates for later in coming)

    def update(self, training: Training) -> None:
        self._collect(training)
        super().update(training)
        self._sums = {}

    def before_step(self, training: Training) -> None:
        if self.num_grads > 1 and self.watches_gradients(training, training.step + 1):
            self._collect(training)

    @torch.no_grad()
    def _collect(self, training: Training) -> None:
        if not (training.masks.watched or training.sparseml):
            return
        for name in training.masks.of(self.owner):
            gradient = training.masks.gradient(name)
            if gradient is not None:
                self._sums[name] = self._sums[name] + gradient if name in self._sums else gradient.clone()

    def growth(self, training: Training, name: str) -> Tensor:
        if name not in self._sums:
            return torch.zeros_like(self.targets[name].parameter)
        return self._sums[name].abs()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": getattr(self, "_sums", {})}

    def load_state_dict(self, state) -> None:
        self._sums = dict(state["sums"])
