"""What pruning modifiers share: which weights, how many, and how scores become masks on a schedule."""

import logging
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparse_ft.masks import masks_from_scores
from sparse_ft.masks.budgets import SCOPES
from sparse_ft.masks.structures import parse_structure

from .base import Bounded, Modifier
from .clock import Clock, SparsemlClock
from .fields import EPOCH, FLAG, Kind, choice, either, exactly, field, number
from .schedules import CURVES, interpolate
from .targets import IGNORED, TARGETS, Target, find_targets, unusual_targets, zero_fraction
from .training import Training

logger = logging.getLogger(__name__)

FROM_PARAM = "__FROM_PARAM__"
SPARSITY = number(0.0, 1.0, below=True)


def _read_budgets(value: object) -> dict[float, list[str]]:
    if not isinstance(value, dict) or not value:
        raise ValueError
    return {SPARSITY.read(sparsity): _read_list(names) for sparsity, names in value.items()}


def _read_list(names: object) -> list[str]:
    read = TARGETS.read(names)
    if isinstance(read, str):
        raise ValueError
    return read


BUDGETS = Kind("a mapping from sparsities to lists of names", _read_budgets)


def _read_structure(value: object) -> str:
    if isinstance(value, list):
        if len(value) != 2 or not all(isinstance(size, int) and size > 0 for size in value):
            raise ValueError
        return "unstructured" if value == [1, 1] else f"block_{value[0]}x{value[1]}"
    if not isinstance(value, str):
        raise ValueError
    known = {"block4": "block_1x4", "tensorrt": "2:4"}.get(value, value)
    known = re.sub(r"^(block_\d+),(\d+)$", r"\1x\2", known)
    if parse_structure(known).kind in ("filter", "channel"):
        raise ValueError("whole filters and channels are pruned by StructuredPruningModifier")
    return known


STRUCTURE = Kind("unstructured, N:M such as '2:4', block4 or a block [rows, columns]", _read_structure)
CURVE = choice(*CURVES)


class MaskedTargets(Modifier):
    """A modifier that holds the weights `params` names to masks."""

    params: Any = field(TARGETS, doc="The weights: `__ALL_PRUNABLE__`, `__ALL__`, or names and `re:` patterns.")
    ignore: list[str] = field(IGNORED, [], doc="Weights to leave out, by name or `re:` pattern.")

    targets: dict[str, Target]
    dense_until_end: ClassVar[bool] = False  # its weights cannot take native form while it is at work
    needs_training: ClassVar[bool] = False  # it prunes by what only training shows

    def check_one_shot(self) -> None:
        if self.one_shot and self.needs_training:
            raise self.wrong(None, "prunes by what training shows, and cannot do it in one shot")

    @property
    def keeps_dense(self) -> bool:
        """Whether its weights cannot take native form now."""
        return self.dense_until_end and not self.phase.ended

    def find_targets(self, model: nn.Module) -> dict[str, Target]:
        """The weights in the model.

        Raises:
            FieldError: a name or pattern matches nothing.
        """
        for name in ("params", "ignore"):
            try:
                if isinstance(getattr(self, name), list):
                    find_targets(model, getattr(self, name))
            except ValueError as error:
                raise self.wrong(name, str(error)) from None
        targets = find_targets(model, self._wanted(), self.ignore)
        if not targets:
            raise self.wrong("params", "the model has no such weights")
        return targets

    def _wanted(self) -> str | list[str]:
        return self.params

    def attach(self, training: Training) -> None:
        self.targets = self.find_targets(training.model)

    def warn_of_unusual(self, training: Training) -> None:
        """Names the targets that pruning usually leaves dense."""
        unusual = unusual_targets(training.model, self.targets)
        if unusual:
            listed = ", ".join(f"{name} ({reason})" for name, reason in list(unusual.items())[:4])
            more = f" and {len(unusual) - 4} more" if len(unusual) > 4 else ""
            logger.warning(
                "%s prunes weights that are usually left dense: %s%s; `ignore:` leaves them out",
                self.type_name, listed, more,
            )  # fmt: skip

    def begin(self, training: Training) -> None:
        """Finds the weights at the start: dense ones, and warns of unusual ones."""
        self.attach(training)
        training.refuse_native(self.targets)
        self.warn_of_unusual(training)

    def masks_by_score(
        self,
        scores: Mapping[str, Tensor],
        sparsity: Mapping[str, float],
        *,
        scope: str,
        structure: str = "unstructured",
        first: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The masks that keep the highest scores.

        Args:
            scores: of each weight, by name.
            sparsity: by name.
            first: True for weights that go before all others; those that are zero if it is not given.
        """
        if first is None:
            first = {name: self.targets[name].parameter.detach() == 0 for name in scores}
        return masks_from_scores(
            {name: values if values.dtype == torch.float64 else values.float() for name, values in scores.items()},
            sparsity,
            scope=scope,
            structure=structure,
            pruned=first,
            transposed={name for name, target in self.targets.items() if target.transposed},
        )

    def masks_by_size(self, sparsity: float, *, scope: str, structure: str = "unstructured") -> dict[str, Tensor]:
        """The masks that keep the largest weights."""
        return self.masks_by_score(
            self.sizes(), dict.fromkeys(self.targets, sparsity), scope=scope, structure=structure
        )

    def sizes(self) -> dict[str, Tensor]:
        """The absolute values of the weights by name."""
        return {name: target.parameter.detach().abs() for name, target in self.targets.items()}

    def rebind(self, targets: Mapping[str, Target]) -> None:
        """Goes on with the parameters that layers have after they have changed their form."""
        self.targets = {name: targets[name] for name in self.targets}

    def resume(self, training: Training) -> None:
        self.attach(training)


class GradualPruning(MaskedTargets, Bounded):
    """Pruning from an initial to a final sparsity on a curve, the mask renewed at each update.

    Sub-classes say what a weight is worth (`scores`).
    """

    periodic = True
    completes = True
    scope_fixed: ClassVar[str] = ""

    init_sparsity: Any = field(
        either(SPARSITY, exactly(FROM_PARAM, f"{FROM_PARAM} for the sparsity that the weights have")),
        unit="fraction of zeros",
        doc="Sparsity at the start.",
    )
    final_sparsity: Any = field(
        either(SPARSITY, BUDGETS),
        unit="fraction of zeros",
        doc="Sparsity at the end; or a mapping from sparsities to names, with `params: []`.",
    )
    update_frequency: float = field(EPOCH, unit="epochs", doc="Between two updates of the mask; -1 for every step.")
    leave_enabled: bool = field(
        FLAG, True, doc="Keep the mask after the end. Otherwise pruned weights may train again from the next step on."
    )
    inter_func: str = field(CURVE, "cubic", doc="Curve from the initial to the final sparsity.")
    mask_type: str = field(STRUCTURE, "unstructured", doc="What is pruned together.")
    scope: str = field(
        choice(*SCOPES),
        "uniform",
        doc="Every weight alike (uniform), more in larger layers (erk), the lowest scores of all together (global).",
    )

    def check(self) -> None:
        super().check()
        if isinstance(self.final_sparsity, dict):
            if self.params != []:
                raise self.wrong("params", "must be [] where final_sparsity names the weights")
            if self.budget_scope() != "uniform":
                raise self.wrong("final_sparsity", f"must be one number under a {self.budget_scope()} budget")
        elif self.params == []:
            raise self.wrong("params", "must name at least one weight")
        fixed = parse_structure(self.mask_type).sparsity
        for name in ("init_sparsity", "final_sparsity"):
            value = getattr(self, name)
            if fixed is not None and (not isinstance(value, float) or abs(value - fixed) > 0.01):
                raise self.wrong(name, f"must be {fixed:g}, which mask_type {self.mask_type!r} fixes, not {value!r}")

    def budget_scope(self) -> str:
        """How the budget is shared between the weights: "uniform", "erk" or "global"."""
        return self.scope

    def _wanted(self) -> str | list[str]:
        if isinstance(self.final_sparsity, dict):
            return [name for names in self.final_sparsity.values() for name in names]
        return self.params

    def attach(self, training: Training) -> None:
        super().attach(training)
        self._final = self._final_by_name(training)

    def _final_by_name(self, training: Training) -> dict[str, float]:
        if not isinstance(self.final_sparsity, dict):
            return dict.fromkeys(self.targets, self.final_sparsity)
        final: dict[str, float] = {}
        for sparsity, names in self.final_sparsity.items():
            for name in find_targets(training.model, names, self.ignore):
                final.setdefault(name, sparsity)
        return final

    def start(self, training: Training) -> None:
        self.attach(training)
        self.warn_of_unusual(training)
        if self.init_sparsity == FROM_PARAM:
            self._initial = {name: zero_fraction([target.parameter]) for name, target in self.targets.items()}
            if self.budget_scope() != "uniform":
                together = zero_fraction([target.parameter for target in self.targets.values()])
                self._initial = dict.fromkeys(self.targets, together)
        else:
            self._initial = dict.fromkeys(self.targets, self.init_sparsity)

    def sparsities(self, clock: Clock, step: int) -> dict[str, float]:
        """The sparsity that each weight is to have at a step, by name."""
        x = clock.progress(self.timing, step)
        return {
            name: interpolate(x, self._initial[name], final, self.inter_func) for name, final in self._final.items()
        }

    @torch.no_grad()
    def update(self, training: Training) -> None:
        training.refuse_native(self.targets)
        masks = self.masks(training, self.sparsities(training.clock, training.step))
        training.masks.hold(self.owner, self.targets, training.agree(masks))

    def masks(self, training: Training, sparsities: Mapping[str, float]) -> dict[str, Tensor]:
        """The masks of these sparsities, by name."""
        scores = self.scores(training)
        return self.masks_by_score(
            scores,
            sparsities,
            scope=self.budget_scope(),
            structure=self.mask_type,
            first={name: self.goes_first(training, name) for name in scores},
        )

    def goes_first(self, training: Training, name: str) -> Tensor:
        """bool: the weights that are pruned before all others: those that are zero already."""
        return self.targets[name].parameter.detach() == 0

    def scores(self, training: Training) -> dict[str, Tensor]:
        """What each weight is worth, by name; the lowest go."""
        raise NotImplementedError

    def end(self, training: Training) -> None:
        if not self.leave_enabled:
            # SparseML lets go before the optimizer's step, whose momentum then revives everything at once.
            training.masks.release(self.owner, at_once=training.sparseml)

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self._initial} if hasattr(self, "_initial") else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if "initial" in state:
            self._initial = {str(name): float(value) for name, value in state["initial"].items()}

    def preview(self, clock: Clock, step: int) -> dict[str, float]:
        initial = 0.0 if self.init_sparsity == FROM_PARAM else self.init_sparsity
        final = self.final_sparsity
        if isinstance(final, dict):
            final = max(final)
        x = clock.progress(self.timing, step)
        if isinstance(clock, SparsemlClock):
            x = min(x, 1.0)
        return {"sparsity": interpolate(x, initial, final, self.inter_func)}

    def unfinished(self, training: Training) -> str:
        final = self.final_sparsity
        shown = f"{max(final):g}" if isinstance(final, dict) else f"{final:g}"
        return f"the final sparsity of {shown} is due at epoch {self.end_epoch:g}"
