"""Parameters that are frozen, set, or moved from one value to another."""

from typing import Any

import torch
from torch import nn

from ..base import Bounded, Modifier
from ..fields import EPOCH, FLAG, NEVER, Kind, either, exactly, field, listing, number
from ..pruning import CURVE
from ..registry import register
from ..schedules import interpolate
from ..targets import ALL, ALL_PRUNABLE, TARGETS, Target, find_targets, is_native
from ..training import Training

_VALUE = either(number(), listing(number(), "numbers"))
_PARAMS: Kind = either(TARGETS, exactly([], "[]"))


class _OfParameters(Modifier):
    params: Any = field(_PARAMS, doc=f"The parameters: `{ALL}`, `{ALL_PRUNABLE}`, or names and `re:` patterns.")
    params_strict: bool = field(FLAG, True, doc="A name that matches nothing is an error.")

    def attach(self, training: Training) -> None:
        try:
            if isinstance(self.params, list) and not self.params_strict:
                known = [entry for entry in self.params if _matches(training.model, entry)]
                self.targets = find_targets(training.model, known)
            else:
                self.targets = find_targets(training.model, self.params)
        except ValueError as error:
            raise self.wrong("params", str(error)) from None

    def resume(self, training: Training) -> None:
        self.attach(training)


def _matches(model: nn.Module, entry: str) -> bool:
    try:
        return bool(find_targets(model, [entry]))
    except ValueError:
        return False


@register("TrainableParamsModifier")
class TrainableParams(_OfParameters):
    """Freezes parameters, or lets them train; as they were before from `end_epoch` on."""

    source = "SparseML"
    trainable: bool = field(FLAG, doc="Whether they train.")
    start_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="When it begins; -1 for at once.")
    end_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="When it ends; -1 for never.")

    targets: dict[str, Target]

    def start(self, training: Training) -> None:
        self.attach(training)
        self._before = {name: target.parameter.requires_grad for name, target in self.targets.items()}
        self._set(dict.fromkeys(self.targets, self.trainable))

    def _set(self, trains: dict[str, bool]) -> None:
        for name, target in self.targets.items():
            target.parameter.requires_grad_(trains[name])
            if not trains[name]:
                target.parameter.grad = None  # of this step, which would still move it

    def end(self, training: Training) -> None:
        self._set(self._before)

    def resume(self, training: Training) -> None:
        super().resume(training)
        self._set(dict.fromkeys(self.targets, self.trainable))

    def state_dict(self) -> dict[str, Any]:
        return {"before": self._before} if hasattr(self, "_before") else {}

    def load_state_dict(self, state) -> None:
        if "before" in state:
            self._before = {str(name): bool(trains) for name, trains in state["before"].items()}


@register("SetParamModifier")
class SetParam(_OfParameters):
    """Sets parameters to a value once."""

    source = "SparseML"
    val: Any = field(_VALUE, doc="The value: one number for all elements, or a list of the parameter's shape.")
    start_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="When; -1 for at once.")
    constant_logging: bool = field(FLAG, False, doc="Without effect; old recipes have it.")

    targets: dict[str, Target]

    def start(self, training: Training) -> None:
        self.attach(training)
        _assign(self, training, self.val)


@register("GradualParamModifier")
class GradualParam(_OfParameters, Bounded):
    """Moves parameters from one value to another."""

    source = "SparseML"
    periodic = True
    init_val: Any = field(_VALUE, doc="Value at the start.")
    final_val: Any = field(_VALUE, doc="Value at the end.")
    update_frequency: float = field(EPOCH, unit="epochs", doc="Between two updates; -1 for every step.")
    inter_func: str = field(CURVE, "linear", doc="Curve between them.")

    targets: dict[str, Target]

    def check(self) -> None:
        super().check()
        if isinstance(self.init_val, list) != isinstance(self.final_val, list) or (
            isinstance(self.init_val, list) and len(self.init_val) != len(self.final_val)
        ):
            raise self.wrong("final_val", "must be of the shape of init_val")

    def start(self, training: Training) -> None:
        self.attach(training)

    def update(self, training: Training) -> None:
        curve = "linear" if training.sparseml else self.inter_func  # SparseML does not look at it
        x = training.clock.progress(self.timing, training.step)
        if isinstance(self.init_val, list):
            pairs = zip(self.init_val, self.final_val, strict=True)
            _assign(self, training, [interpolate(x, first, last, curve) for first, last in pairs])
        else:
            _assign(self, training, interpolate(x, self.init_val, self.final_val, curve))


@torch.no_grad()
def _assign(modifier: SetParam | GradualParam, training: Training, value: float | list[float]) -> None:
    for name, target in modifier.targets.items():
        parameter = target.parameter
        if is_native(target):
            raise modifier.wrong("params", f"{name} is the vector of a native sparse layer's nonzeros")
        new = torch.tensor(value, dtype=parameter.dtype, device=parameter.device)
        if new.ndim and new.shape != parameter.shape:
            raise modifier.wrong("params", f"{name} has shape {tuple(parameter.shape)}, the value {tuple(new.shape)}")
        parameter.copy_(new.expand_as(parameter))
