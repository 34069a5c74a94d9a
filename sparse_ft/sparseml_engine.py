"""Runs a recipe with the real sparseml package: for modifiers that exist only there, and to compare with it.

The package is at its end of life and optional (`pip install 'sparse_ft[sparseml]'`, Python 3.11). Importing it would
report to a server and replace `torch.compile`; both are prevented here.
"""

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from sparse_ft.atomic import replacing
from sparse_ft.optimizer_state import inner_optimizer
from sparse_ft.recipes import RecipeError
from sparse_ft.recipes.overrides import parse_overrides
from sparse_ft.recipes.source import front_matter, read_source

VERSION = "1.8.0"


class SparsemlRecipe(TrainerCallback):
    """A recipe in the hands of sparseml, which acts around every optimizer step of a `Trainer`.

    Args:
        recipe: what `Recipe.load` reads; its text is not checked here, and may have modifiers that only sparseml has.
        args: values of its variables.

    Attributes:
        max_epochs: how many epochs it lasts.
        sets_learning_rate: whether it has learning rates.

    Raises:
        RecipeError: sparseml is not installed or of another version, refuses the recipe, or has to distil.
    """

    def __init__(self, recipe: str | Path, args: str | Mapping[str, Any] | None = None):
        text = read_source(recipe)
        self.name, self.text = text.name, front_matter(text)
        manager_class = _import_manager(self.name)
        try:
            self._manager = manager_class.from_yaml(self.text + "\n", recipe_variables=parse_overrides(args) or None)
        except Exception as error:  # of any kind: sparseml has none of its own
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RecipeError(f"sparseml does not read it: {reason[0]}", recipe=self.name) from error
        if self._manager.distillation_modifiers:
            raise RecipeError(
                "distils, which engine 'sparseml' does not: leave the modifier out, or use the own engine",
                recipe=self.name,
            )
        self.max_epochs = int(self._manager.max_epochs)
        self.sets_learning_rate = bool(self._manager.learning_rate_modifiers)
        self._model: nn.Module | None = None
        self._steps = 0
        self._steps_per_epoch = 1

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> None:
        """Puts it to work; to be called before the first step."""
        self._model, self._optimizer = model, inner_optimizer(optimizer)
        self._steps, self._steps_per_epoch = 0, steps_per_epoch
        self._manager.initialize(model, epoch=0.0, loggers=[])

    @property
    def _where(self) -> dict[str, Any]:
        return {"epoch": self._steps / self._steps_per_epoch, "steps_per_epoch": self._steps_per_epoch}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._manager.update(self._model, self._optimizer, log_updates=False, **self._where)
        self._manager.optimizer_pre_step(self._model, self._optimizer, **self._where)

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._manager.optimizer_post_step(self._model, self._optimizer, **self._where)
        self._steps += 1

    def on_train_end(self, args, state, control, **kwargs):
        self._manager.finalize(self._model)

    def save(self, path: Path) -> None:
        """Writes its text."""
        with replacing(path) as temporary:
            temporary.write_text(self.text, encoding="utf-8")


def _import_manager(recipe: str) -> Any:
    if find_spec("sparseml") is None:
        raise RecipeError(
            "engine 'sparseml' needs the package: pip install 'sparse_ft[sparseml]' (Python 3.11)", recipe=recipe
        )
    os.environ["NM_DISABLE_ANALYTICS"] = "1"
    compile_function = torch.compile
    try:
        import sparseml
        from sparseml.pytorch.optim import ScheduledModifierManager
    except ImportError as error:
        raise RecipeError(f"sparseml cannot be imported: {error}", recipe=recipe) from error
    finally:
        torch.compile = compile_function
    if sparseml.__version__ != VERSION:
        raise RecipeError(f"engine 'sparseml' is made for {VERSION}, not {sparseml.__version__}", recipe=recipe)
    return ScheduledModifierManager
