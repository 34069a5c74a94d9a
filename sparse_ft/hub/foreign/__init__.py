"""Checkpoints that other tools left, read into a dense state dict and masks; one file a format.

Nothing that is read here can run code: pickles are opened with torch's `weights_only` reader alone.
"""

from .checkpoint import Checkpoint, read_checkpoint
from .files import CHECKPOINT_SUFFIXES, read_index, read_recipe
from .names import fit, renamed

__all__ = ["CHECKPOINT_SUFFIXES", "Checkpoint", "fit", "read_checkpoint", "read_index", "read_recipe", "renamed"]
