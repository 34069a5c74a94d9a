"""Fine-tune sparse networks on ordinary CPUs, faster than dense ones."""

import importlib
import sys
from typing import Any

from sparse_ft.when_imported import when_imported

__version__ = "0.1.0"

# Public name -> module. Loaded on first use: `import sparse_ft` alone does not import torch, which takes seconds.
_PUBLIC = {
    "ConversionReport": "sparse_ft.conversion",
    "Recipe": "sparse_ft.recipes",
    "RecipeError": "sparse_ft.recipes",
    "SparseSession": "sparse_ft.session",
    "SparseTrainer": "sparse_ft.trainer",
    "SparseTrainingArguments": "sparse_ft.trainer",
    "SparsityReport": "sparse_ft.masks",
    "StepComparison": "sparse_ft.bench",
    "apply_recipe": "sparse_ft.session",
    "compare_steps": "sparse_ft.bench",
    "convert": "sparse_ft.conversion",
    "freeze_masks": "sparse_ft.nn",
    "from_pretrained": "sparse_ft.hub",
    "prune": "sparse_ft.masks",
    "push_to_hub": "sparse_ft.hub",
    "remove_channels": "sparse_ft.channels",
    "restore_channels": "sparse_ft.channels",
    "save_pretrained": "sparse_ft.hub",
    "sparsity": "sparse_ft.masks",
    "to_dense": "sparse_ft.conversion",
}
_MODULES = ("bench", "channels", "hub", "masks", "methods", "nn", "ops", "recipes", "report")

__all__ = ["__version__", *_PUBLIC, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        module = importlib.import_module(_PUBLIC[name])
        value = getattr(module, name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"sparse_ft.{name}")
    raise AttributeError(f"module 'sparse_ft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


if "torch" in sys.modules:
    # The operators are there as soon as torch and this package are; otherwise with the first name that is used.
    importlib.import_module("sparse_ft.ops")

# `AutoModel.from_pretrained(..., subfolder="sparse")` finds us through this.
when_imported("transformers.quantizers.auto", lambda: importlib.import_module("sparse_ft.quantizer"))
