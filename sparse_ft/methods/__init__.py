"""Training methods: one folder for each, which registers its modifiers when this package is imported."""

import importlib
import pkgutil

from .base import Forward, Modifier, Scheduled, Unsupported
from .fields import Field, FieldError, field
from .registry import find_modifier, modifiers, register
from .training import Training

for _module in pkgutil.iter_modules(__path__):
    if _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "Field",
    "FieldError",
    "Forward",
    "Modifier",
    "Scheduled",
    "Training",
    "Unsupported",
    "field",
    "find_modifier",
    "modifiers",
    "register",
]
