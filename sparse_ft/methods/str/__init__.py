"""STR: the threshold below which weights are zero is learned."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..fields import field, number
from ..hidden import HiddenWeights
from ..registry import register
from ..training import Training

_THRESHOLD = number(0, 0.5, above=True, below=True)


@register("STRPruningModifier")
class STR(HiddenWeights):
    """Soft threshold weight reparameterization: sign(w) x max(|w| - t, 0) computes, t is learned.

    Every weight tensor has its own: t is the sigmoid of a number s that begins at `init_threshold` and moves, with the
    learning rate of its weight, along its gradient and its decay. The decay draws t towards 0.5; sparsity follows from
    both and is no field. Weights below their threshold do not train; they return if it falls.
    """

    source = "Kusupati et al. 2020, arXiv 2002.03231"
    needs_training = True

    init_threshold: float = field(_THRESHOLD, 1e-4, doc="Threshold at the start.")
    threshold_decay: float = field(number(0), 5e-4, doc="Decay of s: the larger, the sparser.")

    _s: dict[str, float]

    def start(self, training: Training) -> None:
        super().start(training)
        self._s = dict.fromkeys(self.targets, math.log(self.init_threshold / (1 - self.init_threshold)))
        self.look(training)

    def threshold(self, name: str) -> float:
        """That of a weight now."""
        return 1 / (1 + math.exp(-self._s[name]))

    def view(self, name: str) -> Tensor:
        return torch.nn.functional.softshrink(self.hidden[name], self.threshold(name))

    def seen(self) -> dict[str, Tensor]:
        return {name: target.parameter.detach() != 0 for name, target in self.targets.items()}

    @torch.no_grad()
    def look(self, training: Training) -> None:
        super().look(training)
        held = training.masks.of(self.owner)
        changed = {name: m for name, m in self.seen().items() if name not in held or not torch.equal(m, held[name])}
        if changed:
            training.masks.hold(self.owner, self.targets, changed)

    @torch.no_grad()
    def before_step(self, training: Training) -> None:
        rates = {id(p): group["lr"] for group in training.optimizer.param_groups for p in group["params"]}
        for name in self.hidden:
            parameter = self.targets[name].parameter
            if parameter.grad is None:
                continue
            # The view moves against its sign when the threshold rises; t' = t (1 - t).
            t = self.threshold(name)
            slope = -float((parameter.grad * parameter.detach().sign()).sum()) * t * (1 - t)
            self._s[name] -= float(rates[id(parameter)]) * (slope + self.threshold_decay * self._s[name])
        super().before_step(training)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"s": getattr(self, "_s", {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._s = {str(name): float(value) for name, value in state["s"].items()}
