"""Fine-tune sparse networks on ordinary CPUs, faster than dense ones."""

import importlib
from typing import Any

from sparse_ft.convert import convert, to_dense  # at once: the function and its module share a name

__version__ = "0.1.0"

# Public name -> module. Loaded on first use, so that `import sparse_ft` costs little more than torch.
_PUBLIC = {
    "ConversionReport": "sparse_ft.convert",
    "SparseTrainer": "sparse_ft.trainer",
    "SparseTrainingArguments": "sparse_ft.trainer",
    "SparsityReport": "sparse_ft.masks",
    "StepComparison": "sparse_ft.bench",
    "compare_steps": "sparse_ft.bench",
    "freeze_masks": "sparse_ft.nn",
    "from_pretrained": "sparse_ft.hub",
    "prune": "sparse_ft.masks",
    "push_to_hub": "sparse_ft.hub",
    "save_pretrained": "sparse_ft.hub",
    "sparsity": "sparse_ft.masks",
}
_MODULES = ("bench", "hub", "masks", "nn", "ops", "report")

__all__ = ["__version__", "convert", "to_dense", *_PUBLIC, *_MODULES]


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
