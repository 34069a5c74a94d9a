"""Datasets made ready for `Trainer`: `load_data` finds and understands them, `prepare` fits them to a model."""

from .columns import TASKS, Task
from .errors import DataError
from .load import Data, load_data
from .prepare import PreparedData, prepare
from .splits import Split

__all__ = ["TASKS", "Data", "DataError", "PreparedData", "Split", "Task", "load_data", "prepare"]
