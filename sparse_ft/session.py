"""Runs a recipe in a training loop.

```python
session = SparseSession(model, "recipe.yaml", optimizer, steps_per_epoch=len(loader))
for epoch in range(session.max_epochs):
    for batch in loader:
        loss(model, batch).backward()
        session.before_step()
        optimizer.step()
        session.after_step()
        optimizer.zero_grad()
session.finalize()
```
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.conversion import to_dense
from sparse_ft.masks import SparsityReport, sparsity
from sparse_ft.masks.targets import unwrap
from sparse_ft.methods import FieldError, Forward, Modifier, Training
from sparse_ft.methods.clock import ExactClock, SparsemlClock
from sparse_ft.methods.fields import NEVER
from sparse_ft.methods.pruning import MaskedTargets
from sparse_ft.methods.targets import dense_shape_of, named_targets
from sparse_ft.methods.training import GradSampler
from sparse_ft.recipes import Recipe, RecipeError
from sparse_ft.recipes.recipe import Compat

logger = logging.getLogger(__name__)

_FORMAT = 1


class SparseSession:
    """A recipe at work on a model and its optimizer, counted in optimizer steps.

    Args:
        model: the model in training, also inside DistributedDataParallel; names of the recipe are those without
            wrapper.
        recipe: what `Recipe.load` reads, or a recipe.
        optimizer: that of the training. Its state is kept at zero wherever a weight is pruned.
        steps_per_epoch: optimizer steps of an epoch (batches / accumulated batches, rounded up).
        total_steps: of the whole training; `max_epochs * steps_per_epoch` if it is not given.
        teacher: what modifiers that distil learn from: a model, "self" for a copy of the model as it is now, or
            "disable" to leave such modifiers out.
        grad_sampler: for second-order methods: called with a count, a seed and a batch size (or None), gives that many
            losses of the model on fresh batches, with their graphs; the same for the same seed.
        recipe_args, compat, ignore_unknown: see `Recipe.load`.

    Attributes:
        recipe: what it runs.
        step: optimizer steps done.

    Raises:
        RecipeError: the recipe is wrong, has a modifier that is not supported, or names weights that the model lacks.
        ValueError: a step count below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: str | Path | Recipe,
        optimizer: torch.optim.Optimizer,
        steps_per_epoch: int,
        *,
        total_steps: int | None = None,
        teacher: nn.Module | str | None = None,
        grad_sampler: GradSampler | None = None,
        recipe_args: str | Mapping[str, Any] | None = None,
        compat: Compat = None,
        ignore_unknown: bool = False,
    ):
        if steps_per_epoch < 1 or (total_steps is not None and total_steps < 1):
            raise ValueError(f"steps must be at least 1, not {steps_per_epoch} per epoch and {total_steps} in total")
        self.recipe = Recipe.load(recipe, args=recipe_args, compat=compat, ignore_unknown=ignore_unknown)
        self.recipe.check_supported()
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps or self.recipe.max_epochs * steps_per_epoch or None
        clock = SparsemlClock if self.recipe.compat == "sparseml" else ExactClock
        self.training = Training(model, optimizer, clock(steps_per_epoch, self.total_steps))
        self._modifiers = self.recipe.fresh_modifiers()
        self._in_step = False
        self._check_names()
        self.training.grad_sampler = grad_sampler
        self._own_teacher = teacher == "self"
        self._set_teacher(teacher)
        for modifier in self._modifiers:
            with self._blaming(modifier):
                modifier.listen(self.training)
        self._announce_gradients()

    def _check_names(self) -> None:
        """Finds names that the model lacks now, and not hours later when their modifier begins."""
        for modifier in self._modifiers:
            if isinstance(modifier, MaskedTargets):
                with self._blaming(modifier):
                    modifier.find_targets(self.training.model)

    def _set_teacher(self, teacher: nn.Module | str | None) -> None:
        if teacher == "disable":
            self._modifiers = [modifier for modifier in self._modifiers if not modifier.needs_teacher]
            return
        if isinstance(teacher, str):
            if teacher != "self":
                raise ValueError(f'teacher must be a model, "self" or "disable", not {teacher!r}')
            # Dense, whatever form the model has: a resumed one may have more native layers than at the beginning.
            teacher = to_dense(copy.deepcopy(self.training.model))
        if teacher is not None:
            self.training.teacher = teacher.eval().requires_grad_(False)
        for modifier in self._modifiers:
            if modifier.needs_teacher:
                with self._blaming(modifier):
                    self.training.need_teacher()

    def _blaming(self, modifier: Modifier) -> "_Blame":
        return _Blame(self.recipe, modifier)

    @property
    def step(self) -> int:
        return self.training.step

    @property
    def epoch(self) -> float:
        """Where the training is: steps / steps_per_epoch."""
        return self.training.epoch

    @property
    def max_epochs(self) -> int:
        """How many epochs the recipe lasts."""
        return self.recipe.max_epochs

    @property
    def masks(self) -> dict[str, Tensor]:
        """bool masks of the weights that are held now, by name in the state dict; True where a weight trains."""
        masks = self.training.masks
        return {name: kept for name in masks.names() if (kept := masks.kept(name)) is not None}

    @property
    def settled(self) -> bool:
        """Whether all pruning of the recipe is done, so that the masks stay as they are."""
        return all(
            modifier.phase.ended or (modifier.phase.started and modifier.timing.end == NEVER)
            for modifier in self._modifiers
            if isinstance(modifier, MaskedTargets) and modifier.completes
        )

    def acts_within(self, steps: int) -> bool:
        """Whether so many next steps may change masks, or the next one looks at gradients of pruned weights."""
        training = self.training
        masks = training.masks
        return (
            masks.watched
            or (masks.dense_gradients and not training.sparseml)
            or any(
                training.clock.event(modifier.timing, modifier.phase, step)
                for modifier in self._modifiers
                if isinstance(modifier, MaskedTargets)
                for step in range(training.step, training.step + steps)
            )
        )

    @property
    def convertible(self) -> dict[str, Tensor]:
        """Masks that may be native patterns while they stand still, by weight name."""
        return {name: mask for name, mask in self.masks.items() if name not in self._kept_dense}

    @property
    def _kept_dense(self) -> set[str]:
        return {
            name
            for modifier in self._modifiers
            if isinstance(modifier, MaskedTargets) and modifier.keeps_dense
            for name in modifier.find_targets(self.training.model)
        }

    @property
    def waiting(self) -> set[str]:
        """Names of weights that a modifier is yet to prune, or is pruning."""
        return {
            name
            for modifier in self._modifiers
            if isinstance(modifier, MaskedTargets) and modifier.completes and not modifier.phase.ended
            for name in modifier.find_targets(self.training.model)
        }

    def rebind(self) -> None:
        """Goes on with the parameters that layers have after they have changed their form."""
        targets = named_targets(self.training.model, everything=True)
        for modifier in self._modifiers:
            if isinstance(modifier, MaskedTargets) and hasattr(modifier, "targets"):
                modifier.rebind(targets)
        self.training.masks.rebind(targets)

    def sparsity(self) -> SparsityReport:
        """Sparsity of the model now."""
        return sparsity(self.training.model)

    @property
    def changes_loss(self) -> bool:
        """Whether a modifier changes the loss of the coming step; then the loss to train on is that of `loss`."""
        return any(True for _ in self._at_the_loss())

    def _at_the_loss(self) -> Iterator[Modifier]:
        training = self.training
        for modifier in self._modifiers:
            if modifier.changes_loss and not modifier.phase.ended:
                event = training.clock.event(modifier.timing, modifier.phase, training.step)
                if (modifier.phase.started or event.starts) and not event.ends:
                    yield modifier

    def loss(
        self,
        loss: Tensor,
        outputs: Any,
        inputs: Any,
        *,
        scale: float = 1.0,
        again: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """The loss to train on, with what modifiers add, such as a teacher's part; call it after the forward pass.

        Args:
            loss: of the labels.
            outputs: of the model: a tensor, or a mapping or tuple with tensors.
            inputs: of the model: a mapping of keyword arguments, a tuple, or one argument.
            scale: of terms that are averages over a batch: 1 / batches, where `loss` is part of a mean over several.
            again: gives the loss of the labels by another forward pass on the same batch, for methods that compare
                several networks (FBPS, ProbMask).

        Raises:
            RecipeError: outputs of model and teacher do not fit together, or `again` is needed and not given.
        """
        forward = Forward(loss, outputs, inputs, scale, again)
        for modifier in self._at_the_loss():
            with self._blaming(modifier):
                loss = modifier.loss(self.training, loss, forward)
        return loss

    def before_step(self) -> bool:
        """What is due between the backward pass and `optimizer.step()`; returns whether a modifier that holds masks
        began, ended or was updated.

        With a gradient scaler call it after `scaler.unscale_(optimizer)`.

        Raises:
            RecipeError: a modifier cannot do its work.
        """
        if self._in_step:
            raise RuntimeError("before_step was called twice: call after_step after optimizer.step()")
        self._in_step = True
        training, acted = self.training, False
        for modifier in self._modifiers:
            phase = modifier.phase
            event = training.clock.event(modifier.timing, phase, training.step)
            if not event and not (phase.started and not phase.ended):
                continue
            acted |= bool(event) and isinstance(modifier, MaskedTargets)
            with self._blaming(modifier):
                if event.starts:
                    modifier.start(training)
                if event.updates:
                    modifier.update(training)
                    phase.started, phase.last_update = True, training.epoch
                modifier.before_step(training)
                if event.ends:
                    modifier.end(training)
        training.masks.mask_gradients()
        return acted

    def after_step(self) -> None:
        """What is due after `optimizer.step()`: pruned weights are zero again."""
        if not self._in_step:
            raise RuntimeError("after_step was called without before_step: call that before optimizer.step()")
        self._in_step = False
        training = self.training
        training.masks.apply()
        for modifier in self._modifiers:
            phase = modifier.phase
            if phase.started and not phase.ended:
                modifier.after_step(training)
                phase.ended = bool(training.clock.event(modifier.timing, phase, training.step).ends)
        training.step += 1
        self._announce_gradients()

    def _announce_gradients(self) -> None:
        """Lets the gradients of the next step pass the masks, or be noted, if a modifier asks for it."""
        training = self.training
        active = [modifier for modifier in self._modifiers if modifier.phase.started and not modifier.phase.ended]
        # SparseML masks gradients when all modifiers have had their say, and not before.
        training.masks.dense_gradients = training.sparseml or any(
            modifier.wants_dense_gradients(training, training.step) for modifier in active
        )
        training.masks.watched = any(modifier.watches_gradients(training, training.step) for modifier in active)

    def apply_masks(self, model: nn.Module) -> None:
        """Zeroes the pruned weights of another model of the same names: an average (EMA) of the weights, for one."""
        parameters = dict(unwrap(model).named_parameters())
        with torch.no_grad():
            for name, mask in self.masks.items():
                parameters[name].masked_fill_(~mask.to(parameters[name].device), 0.0)

    def finalize(self) -> SparsityReport:
        """Ends the session: masks are applied once more and let go, what is unfinished is warned of.

        The model is as dense in layout as before, with its zeros; hold them with `sparse_ft.freeze_masks` or a
        ConstantPruningModifier if training goes on.

        Returns:
            The sparsity of every layer.
        """
        for modifier in self._modifiers:
            missing = "" if modifier.phase.ended else modifier.unfinished(self.training)
            if missing:
                logger.warning("training ended at epoch %g, but %s (%s)", self.epoch, missing, modifier.type_name)
        self.training.masks.apply()
        self.training.masks.remove()
        for modifier in self._modifiers:
            modifier.stop_listening()
        return self.sparsity()

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed session needs beside model and optimizer: plain values and tensors.

        "masks" has the mask of every modifier and weight under "INDEX.NAME"; the rest can be written as JSON.
        """
        if self._in_step:
            raise RuntimeError("the state can be taken after after_step, not in the middle of a step")
        return {
            "format": _FORMAT,
            "step": self.step,
            "modifiers": [
                {"type": modifier.type_name, **modifier.phase.state_dict(), "state": modifier.state_dict()}
                for modifier in self._modifiers
            ],
            "masks": {
                f"{modifier.owner}.{name}": mask
                for modifier in self._modifiers
                for name, mask in self.training.masks.of(modifier.owner).items()
            },
            "teacher": dict(self._teacher_state()),
        }

    def _teacher_state(self) -> dict[str, Tensor]:
        # A teacher that is the model of the beginning is nowhere else.
        return self.training.teacher.state_dict() if self._own_teacher and self.training.teacher else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken; model and optimizer have to be loaded before.

        Raises:
            RecipeError: the state is of a recipe with other modifiers, or of another model.
        """
        entries = state.get("modifiers", ())
        if state.get("format") != _FORMAT or [e["type"] for e in entries] != [m.type_name for m in self._modifiers]:
            theirs = ", ".join(entry["type"] for entry in entries) or "none"
            raise RecipeError(
                f"cannot go on from this state: it is of a recipe with the modifiers {theirs}", recipe=self.recipe.name
            )
        training = self.training
        training.masks.remove()
        training.step = int(state["step"])
        self._in_step = False
        for modifier, entry in zip(self._modifiers, entries, strict=True):
            phase = modifier.phase
            phase.started, phase.ended = bool(entry["started"]), bool(entry["ended"])
            phase.last_update = float(entry["last_update"])
            modifier.load_state_dict(entry["state"])
            masks = _of_owner(state["masks"], modifier.owner)
            with self._blaming(modifier):
                if phase.started and (not phase.ended or masks):
                    modifier.resume(training)
                if masks:
                    assert isinstance(modifier, MaskedTargets)
                    _check_masks(modifier, masks)
                    training.masks.hold(modifier.owner, modifier.targets, masks)
        if self._own_teacher and self.training.teacher is not None and state.get("teacher"):
            self.training.teacher.load_state_dict(state["teacher"])
        self._announce_gradients()


def _of_owner(masks: Mapping[str, Tensor], owner: int) -> dict[str, Tensor]:
    prefix = f"{owner}."
    return {name.removeprefix(prefix): mask.bool() for name, mask in masks.items() if name.startswith(prefix)}


def _check_masks(modifier: MaskedTargets, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        target = modifier.targets.get(name)
        shape = None if target is None else dense_shape_of(target)
        if shape != mask.shape:
            found = "no such weight" if shape is None else f"shape {tuple(shape)}"
            raise ValueError(f"the state has a mask of {name} of shape {tuple(mask.shape)}, the model has {found}")


class _Blame:
    """Turns errors of a modifier into those of its line in the recipe."""

    def __init__(self, recipe: Recipe, modifier: Modifier):
        self.recipe = recipe
        self.modifier = modifier

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, FieldError) or (isinstance(error, ValueError) and not isinstance(error, RecipeError)):
            raise self.recipe.blame(self.modifier, error) from error


def apply_recipe(
    model: nn.Module,
    recipe: str | Path | Recipe,
    *,
    grad_sampler: GradSampler | None = None,
    recipe_args: str | Mapping[str, Any] | None = None,
    ignore_unknown: bool = False,
) -> SparsityReport:
    """Prunes a model at one go, in place and without training, to what a recipe leads to in the end.

    Args:
        recipe: its one-shot stages (`run_type: oneshot`) are applied, or all of it if it has none. What does not prune
            has no effect.
        grad_sampler, recipe_args, ignore_unknown: see `SparseSession`.

    Raises:
        RecipeError: the recipe is wrong, or prunes by what only training shows, such as movement.
    """
    loaded = Recipe.load(recipe, args=recipe_args, ignore_unknown=ignore_unknown).at_once()
    still = torch.optim.SGD(model.parameters(), lr=0.0)
    session = SparseSession(model, loaded, still, 1, total_steps=1, teacher="disable", grad_sampler=grad_sampler)
    if not loaded.check_names(unwrap(model)):
        raise RecipeError("prunes nothing", recipe=loaded.name)
    session.before_step()
    session.after_step()
    return session.finalize()
