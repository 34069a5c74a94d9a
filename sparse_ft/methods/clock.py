"""When modifiers act: epochs of a recipe on the grid of optimizer steps.

Step i (from 0) is the i-th optimizer step, and stands at epoch i / steps_per_epoch. What is due at epoch e happens at
the first step that is at e or later, after the backward pass and before the optimizer moves the weights.
"""

from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from .fields import NEVER


@dataclass(frozen=True)
class Timing:
    """What a recipe says: `start` and `end` in epochs, -1 for at once and never.

    Attributes:
        frequency: epochs between updates, -1 for every step; None for no update between start and end.
        completes: the end must come within the training, if it comes right after its last step.
    """

    start: float
    end: float
    frequency: float | None
    completes: bool = False


@dataclass
class Phase:
    """How far a modifier is; what a checkpoint keeps of it."""

    started: bool = False
    ended: bool = False
    last_update: float = 0.0  # epoch

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Event:
    """What is due for a modifier at a step."""

    starts: bool = False
    updates: bool = False
    ends: bool = False

    def __bool__(self) -> bool:
        return self.starts or self.updates or self.ends


class ExactClock:
    """Whole steps only: an update is never early, late or left out for a rounding error.

    Args:
        total_steps: steps of the whole training; None if it has no known end.
    """

    def __init__(self, steps_per_epoch: int, total_steps: int | None = None):
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps

    def step_of(self, epoch: float) -> int:
        """The first step at or after an epoch."""
        exact = _exact(epoch)
        return -(-exact.numerator * self.steps_per_epoch // exact.denominator)

    def start_step(self, timing: Timing) -> int:
        return max(0, self.step_of(timing.start))

    def end_step(self, timing: Timing) -> int | None:
        if timing.end == NEVER:
            return None
        step = self.step_of(timing.end)
        if timing.completes and step == self.total_steps:
            return max(step - 1, self.start_step(timing))
        return step

    def elapsed(self, timing: Timing, step: int) -> Fraction:
        """Epochs since the start."""
        return Fraction(step, self.steps_per_epoch) - max(_exact(timing.start), Fraction(0))

    def number(self, epochs: float) -> Fraction:
        """A number of a recipe, in the arithmetic of this clock."""
        return _exact(epochs)

    def event(self, timing: Timing, phase: Phase, step: int) -> Event:
        if phase.ended:
            return Event()
        start, end = self.start_step(timing), self.end_step(timing)
        ends = end is not None and step >= end
        if not phase.started:
            return Event(starts=step >= start, updates=step >= start, ends=ends and step >= start)
        return Event(updates=ends or self._is_update(timing, step), ends=ends)

    def _is_update(self, timing: Timing, step: int) -> bool:
        if timing.frequency is None:
            return False
        if timing.frequency <= 0:
            return True
        return self._updates_until(timing, step) > self._updates_until(timing, step - 1)

    def _updates_until(self, timing: Timing, step: int) -> int:
        assert timing.frequency is not None
        start, frequency = max(_exact(timing.start), Fraction(0)), _exact(timing.frequency)
        since = step * start.denominator - start.numerator * self.steps_per_epoch
        return since * frequency.denominator // (self.steps_per_epoch * start.denominator * frequency.numerator)

    def progress(self, timing: Timing, step: int) -> float:
        """Part of the way from start to end, in [0, 1]; 1 at the end's step."""
        end = self.end_step(timing)
        assert end is not None
        if step >= end:
            return 1.0
        length = _exact(timing.end) - max(_exact(timing.start), Fraction(0))
        return max(float(self.elapsed(timing, step) / length), 0.0)


class SparsemlClock:
    """The clock of sparseml 1.8.0, its floating-point epochs included: 0.1 three times is later than 0.3."""

    def __init__(self, steps_per_epoch: int, total_steps: int | None = None):
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps

    def elapsed(self, timing: Timing, step: int) -> float:
        """Epochs since the start."""
        return step / self.steps_per_epoch - timing.start

    def number(self, epochs: float) -> float:
        """A number of a recipe, in the arithmetic of this clock."""
        return epochs

    def event(self, timing: Timing, phase: Phase, step: int) -> Event:
        epoch = step / self.steps_per_epoch
        if phase.ended:
            return Event()
        starts = not phase.started and epoch >= timing.start
        ends = (phase.started or starts) and timing.end != NEVER and epoch >= timing.end
        updates = starts or ends
        if phase.started and timing.frequency is not None:
            updates = updates or timing.frequency == NEVER or epoch >= phase.last_update + timing.frequency
        return Event(starts, updates, ends)

    def progress(self, timing: Timing, step: int) -> float:
        """Part of the way from start to end; beyond 1 where an end between two steps is overshot."""
        return (step / self.steps_per_epoch - timing.start) / (timing.end - timing.start)


Clock = ExactClock | SparsemlClock


@lru_cache(maxsize=1024)
def _exact(epoch: float) -> Fraction:
    # What the recipe says, not the binary number nearest to it.
    return Fraction(repr(float(epoch)))
