"""Top-KAST: the backward pass sees more weights than the forward pass."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..clock import Clock
from ..fields import EPOCH, FLAG, field, number
from ..hidden import HiddenWeights
from ..pruning import SPARSITY, STRUCTURE
from ..registry import register
from ..training import Training


@register("TopKASTPruningModifier")
class TopKAST(HiddenWeights):
    """Always sparse training: the largest weights compute, a larger set of them trains, the rest waits.

    Weights that wait keep their values; they return when those that train decay below them. The decay is added to the
    gradient: `active_weight_decay` x weight for weights that compute, and as much divided by the share of weights that
    compute for those that only train.
    """

    source = "Jayakumar et al. 2020, arXiv 2106.03517"
    periodic = True

    forward_sparsity: float = field(SPARSITY, unit="fraction of zeros", doc="Sparsity of what computes.")
    backward_sparsity: float = field(SPARSITY, unit="fraction of zeros", doc="Sparsity of what trains.")
    update_frequency: float = field(EPOCH, unit="epochs", doc="Between two choices of the sets; -1 for every step.")
    global_sparsity: bool = field(FLAG, True, doc="One budget for all weights together, or every weight alike.")
    mask_type: str = field(STRUCTURE, "unstructured", doc="What is pruned together.")
    active_weight_decay: float = field(number(0), 1e-4, doc="Decay of the weights that train.")

    _computes: dict[str, Tensor]

    def check(self) -> None:
        super().check()
        if self.backward_sparsity > self.forward_sparsity:
            raise self.wrong("backward_sparsity", f"must be at most forward_sparsity ({self.forward_sparsity:g})")

    @torch.no_grad()
    def update(self, training: Training) -> None:
        masks = {}
        for sparsity in (self.forward_sparsity, self.backward_sparsity):
            masks[sparsity] = training.agree(
                self.masks_by_score(
                    {name: hidden.abs() for name, hidden in self.hidden.items()},
                    dict.fromkeys(self.hidden, sparsity),
                    scope="global" if self.global_sparsity else "uniform",
                    structure=self.mask_type,
                    first={name: hidden == 0 for name, hidden in self.hidden.items()},
                )
            )
        self._computes = masks[self.forward_sparsity]
        training.masks.hold(self.owner, self.targets, masks[self.backward_sparsity])

    def view(self, name: str) -> Tensor:
        return self.hidden[name].masked_fill(~self._computes[name], 0.0)

    def seen(self) -> dict[str, Tensor]:
        return self._computes

    @torch.no_grad()
    def before_step(self, training: Training) -> None:
        super().before_step(training)
        decay = self.active_weight_decay
        for name in self.hidden:
            parameter = self.targets[name].parameter
            if decay and parameter.grad is not None:
                by_set = torch.where(self._computes[name], decay, decay / (1 - self.forward_sparsity))
                parameter.grad.addcmul_(parameter, by_set.to(parameter.dtype))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"computes": getattr(self, "_computes", {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._computes = dict(state["computes"])

    def preview(self, clock: Clock, step: int) -> dict[str, float]:
        return {"sparsity": self.forward_sparsity}
