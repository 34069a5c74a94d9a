"""Weight decay."""

from typing import Any

from ..base import Modifier
from ..clock import Clock
from ..fields import EPOCH, FLAG, INTEGERS, NEVER, NOTHING, either, field, number
from ..registry import register
from ..training import Training


@register("SetWeightDecayModifier")
class SetWeightDecay(Modifier):
    """Sets the optimizer's weight decay once."""

    source = "SparseML"
    weight_decay: float = field(number(0), doc="The weight decay.")
    start_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="When; -1 for at once.")
    param_groups: Any = field(
        either(INTEGERS, NOTHING), None, doc="Indices of the optimizer's parameter groups; all if it is not given."
    )
    constant_logging: bool = field(FLAG, False, doc="Without effect; old recipes have it.")

    def start(self, training: Training) -> None:
        groups = training.groups(self.param_groups)
        if not any("weight_decay" in group for group in groups):
            raise self.wrong("weight_decay", f"{type(training.optimizer).__name__} has no weight decay")
        for group in groups:
            group["weight_decay"] = self.weight_decay

    def preview(self, clock: Clock, step: int) -> dict[str, float]:
        return {"weight decay": self.weight_decay}
