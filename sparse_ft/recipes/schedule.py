"""What a recipe does when, without a model: as a table, as figures, and drawn."""

from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_ft.atomic import replacing
from sparse_ft.methods import Modifier
from sparse_ft.methods.clock import Clock, ExactClock, Phase, SparsemlClock, Timing
from sparse_ft.methods.fields import NEVER
from sparse_ft.tables import format_table

from .recipe import Recipe

SPARSITY = "sparsity"
_POINTS = 40  # of a curve, per epoch at most
_SHOWN_TARGETS = 3


@dataclass(frozen=True)
class Track:
    """One modifier in time.

    Attributes:
        updates: steps at which it acts.
        values: what it sets at each of them, by quantity ("sparsity", "learning rate", "weight decay").
        end: step from which it sets nothing any more; None if what it has set stays.
    """

    modifier: Modifier
    updates: list[int]
    values: list[dict[str, float]]
    end: int | None

    def at(self, step: int) -> dict[str, float]:
        """What it has set by a step."""
        last = bisect_right(self.updates, step) - 1
        return {} if last < 0 or (self.end is not None and step > self.end) else self.values[last]


@dataclass(frozen=True)
class Schedule:
    """A recipe's schedule; `str()` is two tables: the modifiers, and what is set at the beginning of each epoch."""

    recipe: Recipe
    steps_per_epoch: int
    epochs: int
    tracks: list[Track] = field(default_factory=list)

    @property
    def quantities(self) -> list[str]:
        """What is set, "sparsity" first."""
        found = {name for track in self.tracks for values in track.values for name in values}
        return sorted(found, key=lambda name: (name != SPARSITY, name))

    def at(self, step: int) -> dict[str, list[float]]:
        """What is set by a step: of sparsity the value of each modifier, of other quantities the latest."""
        values: dict[str, list[float]] = {}
        latest: dict[str, int] = {}
        for track in self.tracks:
            for name, value in track.at(step).items():
                since = track.updates[0]
                if name == SPARSITY:
                    values.setdefault(name, []).append(value)
                elif since >= latest.get(name, -1):
                    values[name], latest[name] = [value], since
        return values

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the modifiers, and what is set at the beginning of each epoch."""
        return {
            "recipe": self.recipe.name,
            "dialect": self.recipe.document.dialect,
            "epochs": self.epochs,
            "steps_per_epoch": self.steps_per_epoch,
            "modifiers": [
                {
                    "type": track.modifier.type_name,
                    "start_epoch": track.modifier.timing.start,
                    "end_epoch": track.modifier.timing.end,
                    "updates": len(track.updates),
                    "fields": track.modifier.given,
                }
                for track in self.tracks
            ],
            "schedule": [{"epoch": e, **self.at(e * self.steps_per_epoch)} for e in range(self.epochs + 1)],
        }

    def __str__(self) -> str:
        rows = [_row(track) for track in self.tracks]
        table = format_table(["modifier", "start", "end", "updates", "sets", "of"], rows)
        if not self.quantities:
            return table
        by_epoch = []
        for epoch in range(self.epochs + 1):
            values = self.at(epoch * self.steps_per_epoch)
            by_epoch.append([str(epoch), *(_range(name, values.get(name, [])) for name in self.quantities)])
        return f"{table}\n\n{format_table(['epoch', *self.quantities], by_epoch)}"

    def plot(self, path: str | Path) -> None:
        """Draws sparsity and learning rate over the epochs, to a PNG, SVG or PDF file by its suffix."""
        # A figure of its own leaves pyplot and the backend that the user has chosen alone.
        from matplotlib.figure import Figure

        shown = [name for name in self.quantities if name in (SPARSITY, "learning rate")] or self.quantities[:1]
        figure = Figure(figsize=(8, 0.6 + 2.4 * max(1, len(shown))), layout="constrained")
        for axes, name in zip(
            figure.subplots(max(1, len(shown)), sharex=True, squeeze=False)[:, 0], shown, strict=False
        ):
            for label, points in self._curves(name).items():
                axes.plot(*zip(*points, strict=True), drawstyle="steps-post", label=label, color=None)
            axes.set_ylabel("sparsity, %" if name == SPARSITY else name)
            axes.grid(alpha=0.3)
            if name == SPARSITY:
                axes.set_ylim(0, 100)
                if 1 < len(self._curves(name)) <= 8:
                    axes.legend(fontsize=7)
        figure.axes[-1].set_xlabel("epoch")
        figure.axes[0].set_title(self.recipe.name, fontsize=10, parse_math=False)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150)

    def _curves(self, name: str) -> dict[str, list[tuple[float, float]]]:
        every = max(1, self.steps_per_epoch // _POINTS)
        steps = range(0, self.epochs * self.steps_per_epoch + 1, every)
        if name != SPARSITY:
            points = [(step / self.steps_per_epoch, values) for step in steps if (values := self.at(step).get(name))]
            return {name: [(epoch, values[0]) for epoch, values in points]} if points else {}
        curves: dict[str, list[tuple[float, float]]] = {}
        for i, track in enumerate(self.tracks):
            curve = [(step / self.steps_per_epoch, 100 * track.at(step).get(name, 0.0)) for step in steps]
            if any(name in values for values in track.values) and curve not in curves.values():
                curves[f"{i + 1}: {track.modifier.type_name.removesuffix('Modifier')}"] = curve
        return curves


def make_schedule(recipe: Recipe, steps_per_epoch: int = 100, epochs: int | None = None) -> Schedule:
    """The schedule of a recipe.

    Args:
        steps_per_epoch: optimizer steps of an epoch.
        epochs: of the whole training; as long as the recipe lasts if it is not given.
    """
    epochs = recipe.max_epochs if epochs is None else epochs
    total = epochs * steps_per_epoch
    clock: Clock = (SparsemlClock if recipe.compat == "sparseml" else ExactClock)(steps_per_epoch, total or None)
    acts: dict[Timing, tuple[list[int], int | None]] = {}
    tracks = []
    for modifier in recipe.modifiers:
        if modifier.timing not in acts:
            acts[modifier.timing] = _acts(clock, modifier.timing, total)
        updates, end = acts[modifier.timing]
        values = [modifier.preview(clock, step) for step in updates]
        released = end if not getattr(modifier, "leave_enabled", True) else None
        tracks.append(Track(modifier, updates, values, released))
    return Schedule(recipe, steps_per_epoch, epochs, tracks)


def _acts(clock: Clock, timing: Timing, total: int) -> tuple[list[int], int | None]:
    """Steps at which a modifier acts, the last of them only if it ends."""
    phase, steps = Phase(), []
    for step in range(total + 1):
        event = clock.event(timing, phase, step)
        if event:
            steps.append(step)
            phase.started, phase.last_update = True, step / clock.steps_per_epoch
        if event.ends:
            return steps, step
    return steps, None


def _row(track: Track) -> list[str]:
    modifier, timing = track.modifier, track.modifier.timing
    sets = []
    for name in sorted({name for values in track.values for name in values}):
        first, last = (next(v[name] for v in order if name in v) for order in (track.values, track.values[::-1]))
        shown = [_value(name, first), _value(name, last)]
        sets.append(f"{name} {shown[0] if shown[0] == shown[1] else ' to '.join(shown)}")
    return [
        modifier.type_name,
        "at once" if timing.start == NEVER else f"{timing.start:g}",
        "never" if timing.end == NEVER else f"{timing.end:g}",
        str(len(track.updates)),
        ", ".join(sets),
        _targets(modifier),
    ]


def _targets(modifier: Modifier) -> str:
    names = getattr(modifier, "params", "")
    if names is None:
        return "by default"
    if isinstance(names, str):
        return names
    more = f" and {len(names) - _SHOWN_TARGETS} more" if len(names) > _SHOWN_TARGETS else ""
    return ", ".join(names[:_SHOWN_TARGETS]) + more


def _value(name: str, value: float) -> str:
    return f"{value:.4g}" if name != SPARSITY else f"{value:.1%}"


def _range(name: str, values: list[float]) -> str:
    if not values:
        return ""
    low, high = _value(name, min(values)), _value(name, max(values))
    return low if low == high else f"{low} to {high}"
