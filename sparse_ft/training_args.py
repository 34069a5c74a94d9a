"""Arguments of `SparseTrainer`."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments

_DEFAULTS = {"num_train_epochs": 3.0, "learning_rate": 5e-5}  # of transformers


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments` and what sparse training adds.

    Without an accelerator `use_cpu` is set, so that `bf16=True` and the other CPU options work as they stand.

    `num_train_epochs` and `learning_rate` are those of the recipe unless they are given; without a recipe they are
    transformers' 3 epochs and 5e-5.

    Attributes:
        given: those of the two that were given.
    """

    recipe: str | None = field(
        default=None,
        metadata={"help": "What to do while training: a recipe file, its text, or a Hub id; see docs/recipes.md."},
    )
    recipe_args: str | None = field(
        default=None, metadata={"help": "Values for the recipe's variables: name=value,name=value or JSON."}
    )
    recipe_compat: Literal["exact", "sparseml"] = field(
        default="exact",
        metadata={"help": "sparseml: behave as sparseml 1.8.0 does, with its faults, to repeat an old run."},
    )
    recipe_engine: Literal["sparse_ft", "sparseml"] = field(
        default="sparse_ft",
        metadata={
            "help": "sparseml: let that package, version 1.8.0, run the recipe, for modifiers that only it has."
        },
    )
    ignore_unknown: bool = field(
        default=False,
        metadata={"help": "Warn of modifiers and fields of the recipe that are unknown here, and pass them over."},
    )
    distill_teacher: str | None = field(
        default=None,
        metadata={
            "help": "What a recipe that distils learns from: a model as --model takes it, self (the model as it is "
            "before training), or disable."
        },
    )
    num_train_epochs: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Epochs to train: the recipe's if it has one, else 3, unless this is given."},
    )
    learning_rate: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Initial learning rate. If it is given, the recipe's learning rates are left out."},
    )
    sparse_policy: Literal["auto", "always", "none"] = field(
        default="auto",
        metadata={
            "help": "Which pruned layers run on the native sparse kernels: those measured faster than dense on this "
            "machine (auto), all that can (always), none: masks are kept, nothing gets faster (none)."
        },
    )
    min_sparsity: float = field(
        default=0.5,
        metadata={"help": "Layers with a smaller share of zeros stay dense; their zeros are kept all the same."},
    )
    sparse_ignore: list[str] | None = field(
        default=None,
        metadata={"help": "Layers to leave dense: names, or re:PATTERN. Their zeros are kept all the same."},
    )
    remove_channels: bool = field(
        default=False,
        metadata={
            "help": "After training, take channels that are dead out of the model (of recipes that prune whole "
            "channels); what is saved has zeros in their place, for stock loaders."
        },
    )
    keep_freed_memory: bool = field(
        default=True,
        metadata={
            "help": "Let glibc keep freed memory for the whole process: no page faults for every activation of every "
            "step, but the memory of the largest step is held until the process ends."
        },
    )

    def __post_init__(self) -> None:
        if self.sparse_policy not in ("auto", "always", "none"):
            raise ValueError(f"sparse_policy must be auto, always or none, not {self.sparse_policy!r}")
        if not 0.0 <= self.min_sparsity < 1.0:
            raise ValueError(f"min_sparsity must be in [0, 1), not {self.min_sparsity}")
        if self.recipe_compat not in ("exact", "sparseml"):
            raise ValueError(f"recipe_compat must be exact or sparseml, not {self.recipe_compat!r}")
        if self.recipe_engine not in ("sparse_ft", "sparseml"):
            raise ValueError(f"recipe_engine must be sparse_ft or sparseml, not {self.recipe_engine!r}")
        self.given = {name for name in _DEFAULTS if getattr(self, name) is not None}
        for name in _DEFAULTS.keys() - self.given:
            setattr(self, name, _DEFAULTS[name])
        if not torch.accelerator.is_available():
            self.use_cpu = True
        super().__post_init__()
