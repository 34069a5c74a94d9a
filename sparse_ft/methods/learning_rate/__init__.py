"""Learning rates: set once, stepped down, or on a curve."""

import math
from typing import Any

from ..base import Bounded, Modifier, Scheduled
from ..clock import Clock
from ..fields import (
    EPOCH,
    FLAG,
    INTEGERS,
    MAPPING,
    NEVER,
    NOTHING,
    Field,
    FieldError,
    choice,
    either,
    field,
    integer,
    listing,
    number,
    read_fields,
)
from ..registry import register
from ..schedules import interpolate
from ..training import Training

_GROUPS_DOC = "Indices of the optimizer's parameter groups; all if it is not given."
RATE = number(0)


class LearningRateModifierBase(Modifier):
    """A modifier that sets the learning rate of parameter groups."""

    param_groups: Any = field(either(INTEGERS, NOTHING), None, doc=_GROUPS_DOC)
    constant_logging: bool = field(FLAG, False, doc="Without effect; old recipes have it.")

    def set_rate(self, training: Training, rate: float) -> None:
        try:
            groups = training.groups(self.param_groups)
        except ValueError as error:
            raise self.wrong("param_groups", str(error)) from None
        for group in groups:
            if hasattr(group["lr"], "fill_"):
                group["lr"].fill_(rate)  # a tensor, which compiled optimizers keep
            else:
                group["lr"] = rate


@register("SetLearningRateModifier")
class SetLearningRate(LearningRateModifierBase):
    """Sets the learning rate once."""

    source = "SparseML"
    learning_rate: float = field(RATE, doc="The learning rate.")
    start_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="When; -1 for at once.")

    def start(self, training: Training) -> None:
        self.set_rate(training, self.learning_rate)

    def preview(self, clock: Clock, step: int) -> dict[str, float]:
        return {"learning rate": self.learning_rate}


@register("LearningRateFunctionModifier")
class LearningRateFunction(LearningRateModifierBase, Bounded):
    """Moves the learning rate on a curve, at every step: a straight line, half a cosine, or a line in cycles."""

    source = "SparseML; cosine: Loshchilov & Hutter 2017, arXiv 1608.03983"
    periodic = True
    update_frequency = NEVER

    lr_func: str = field(choice("linear", "cosine", "cyclic_linear"), doc="The curve.")
    init_lr: float = field(RATE, doc="Learning rate at the start, and of each cycle.")
    final_lr: float = field(RATE, doc="Learning rate at the end, and at the last step of each cycle.")
    cycle_epochs: float = field(number(0, above=True), 1.0, unit="epochs", doc="Length of a cycle (cyclic_linear).")

    def rate(self, clock: Clock, step: int) -> float:
        """The learning rate of a step between start and end."""
        if self.lr_func == "cyclic_linear":
            length = clock.number(self.cycle_epochs) * clock.steps_per_epoch
            within = float(clock.elapsed(self.timing, step) * clock.steps_per_epoch % length)
            last = float(length) - 1
            if last <= 0:
                return self.init_lr
            return self.init_lr - min(within / last, 1.0) * (self.init_lr - self.final_lr)
        x = clock.progress(self.timing, step)
        if self.lr_func == "linear":
            return interpolate(x, self.init_lr, self.final_lr, "linear")
        if x >= 1:
            return self.final_lr
        half = (self.final_lr - self.init_lr) / 2
        return half * math.cos(math.pi * x + math.pi) + half + self.init_lr

    def update(self, training: Training) -> None:
        self.set_rate(training, self.rate(training.clock, training.step))

    def preview(self, clock: Clock, step: int) -> dict[str, float]:
        return {"learning rate": self.rate(clock, step)}


def _mapping(**declared: Field) -> dict[str, Field]:
    return declared


_GAMMA = "Factor by which the learning rate shrinks."
_CLASSES: dict[str, dict[str, Field]] = {
    "StepLR": _mapping(
        step_size=field(number(0, above=True), unit="epochs", doc="Time from one step to the next."),
        gamma=field(number(0, above=True), 0.1, doc=_GAMMA),
    ),
    "MultiStepLR": _mapping(
        milestones=field(listing(number(0), "epochs"), unit="epochs", doc="When it steps."),
        gamma=field(number(0, above=True), 0.1, doc=_GAMMA),
    ),
    "ExponentialLR": _mapping(gamma=field(number(0, above=True), doc=_GAMMA)),
    "CosineAnnealingWarmRestarts": _mapping(
        lr_min=field(RATE, doc="Learning rate at the end of a cycle."),
        cycle_epochs=field(number(0, above=True), unit="epochs", doc="Length of the first cycle."),
        cycle_mult=field(integer(1), 1, doc="Factor by which cycles grow."),
    ),
}


@register("LearningRateModifier")
class LearningRate(LearningRateModifierBase, Scheduled):
    """A learning-rate schedule of torch, in epochs instead of steps."""

    source = "SparseML, torch.optim.lr_scheduler"
    periodic = True
    update_frequency = NEVER

    end_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="When it ends, and the rate stays; -1 for never.")
    lr_class: str = field(choice(*_CLASSES), doc="The schedule.")
    lr_kwargs: Any = field(
        MAPPING,
        doc="Its options. StepLR: step_size, gamma; MultiStepLR: milestones, gamma; ExponentialLR: gamma; "
        "CosineAnnealingWarmRestarts: lr_min, cycle_epochs, cycle_mult.",
    )
    init_lr: float = field(RATE, doc="Learning rate at the start.")

    def check(self) -> None:
        super().check()
        try:
            self._options = read_fields(f"{self.type_name}.lr_kwargs", _CLASSES[self.lr_class], self.lr_kwargs)
        except FieldError as error:
            raise self.wrong("lr_kwargs", f"of {self.lr_class}: {error.field} {error.message}") from None
        for milestone in self._options.get("milestones", []):
            if milestone <= self.start_epoch or (self.end_epoch != NEVER and milestone >= self.end_epoch):
                raise self.wrong("lr_kwargs", f"milestone {milestone:g} is not between start_epoch and end_epoch")

    def rate(self, clock: Clock, step: int) -> float:
        """The learning rate of a step from the start on."""
        options, steps = self._options, clock.steps_per_epoch
        begin = clock.elapsed(self.timing, step) * steps
        since = round(begin) if begin == round(begin) else int(begin)
        if self.lr_class == "StepLR":
            return self.init_lr * options["gamma"] ** (since // max(1, round(options["step_size"] * steps)))
        if self.lr_class == "MultiStepLR":
            start = max(self.start_epoch, 0.0)
            passed = sum(since >= round((milestone - start) * steps) for milestone in options["milestones"])
            return self.init_lr * options["gamma"] ** passed
        if self.lr_class == "ExponentialLR":
            return self.init_lr * options["gamma"] ** (since // steps)
        length = max(1, round(options["cycle_epochs"] * steps))
        while since >= length:
            since -= length
            length *= options["cycle_mult"]
        low = options["lr_min"]
        return low + (self.init_lr - low) * (1 + math.cos(math.pi * since / length)) / 2

    def update(self, training: Training) -> None:
        # At its end the rate stays as it is.
        if self.end_epoch == NEVER or training.epoch < self.end_epoch:
            self.set_rate(training, self.rate(training.clock, training.step))

    def preview(self, clock: Clock, step: int) -> dict[str, float]:
        return {"learning rate": self.rate(clock, step)}
