"""What methods share whose optimizer moves other weights than those that the model computes with."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Bounded
from .fields import EPOCH, FLAG, field
from .pruning import MaskedTargets
from .training import Training


class HiddenWeights(MaskedTargets, Bounded):
    """Keeps dense weights out of sight, of which the model has a sparse view.

    Between steps the parameters are the view: what is evaluated, saved and differentiated is sparse. Around the
    optimizer's step they are the hidden weights, as far as these train. At the end the view becomes the weights.
    """

    completes = True
    dense_until_end: ClassVar[bool] = True  # the view is sparser than what trains

    end_epoch: float = field(EPOCH, unit="epochs", doc="When the zeros of the moment become final.")
    leave_enabled: bool = field(FLAG, True, doc="Keep the zeros after the end.")

    hidden: dict[str, Tensor]

    def view(self, name: str) -> Tensor:
        """What the model computes with, of the hidden weight `name`."""
        raise NotImplementedError

    def seen(self) -> dict[str, Tensor]:
        """bool: the weights that the view leaves, by name."""
        raise NotImplementedError

    def start(self, training: Training) -> None:
        self.begin(training)
        self.hidden = {name: target.parameter.detach().clone() for name, target in self.targets.items()}

    @torch.no_grad()
    def before_step(self, training: Training) -> None:
        for name, hidden in self.hidden.items():
            kept = training.masks.kept(name)
            self.targets[name].parameter.copy_(hidden if kept is None else hidden.masked_fill(~kept, 0.0))

    @torch.no_grad()
    def after_step(self, training: Training) -> None:
        for name, hidden in self.hidden.items():
            kept = training.masks.kept(name)
            moved = self.targets[name].parameter.detach()
            hidden.copy_(moved if kept is None else torch.where(kept, moved, hidden))
        self.look(training)

    @torch.no_grad()
    def look(self, training: Training) -> None:
        """Puts the view into the parameters."""
        for name in self.hidden:
            self.targets[name].parameter.copy_(self.view(name))

    @torch.no_grad()
    def end(self, training: Training) -> None:
        self.look(training)
        training.masks.hold(self.owner, self.targets, self.seen())
        self.hidden = {}
        if not self.leave_enabled:
            training.masks.release(self.owner, at_once=training.sparseml)

    def state_dict(self) -> dict[str, Any]:
        return {"hidden": getattr(self, "hidden", {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.hidden = {name: values.clone() for name, values in state["hidden"].items()}
