"""Checkpoint folders that are complete or absent, and what sparse training keeps in them.

Beside transformers' own files a checkpoint holds `sparse_masks.safetensors`, the masks of all pruned layers, and in
`sparse_ft.json` the names of the layers that run natively: a resumed run makes the same choice without measuring
again, so that its arithmetic is the same to the last bit. A run with a recipe adds `recipe.yaml` and
`sparse_session.safetensors`, the state of its modifiers.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TimmWrapperForImageClassification
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sparse_ft.hub.bitmap import MASK_FILE, pack_bits, read_masks, unpack_bits, write_masks
from sparse_ft.hub.save import INFO_FILE
from sparse_ft.hub.source import WEIGHT_FILES

logger = logging.getLogger(__name__)

NATIVE_LAYERS = "native_layers"  # entry of sparse_ft.json
SESSION_FILE = "sparse_session.safetensors"  # state of the recipe's modifiers
_SESSION_ENTRY = "sparse_ft.session"
_TENSOR = "tensor"
_CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file too large"}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; one line says which, why, and what to do."""


@dataclass(frozen=True)
class SparseState:
    """What a checkpoint says of the sparse layers; None where it was written by another program.

    Attributes:
        masks: by weight name, True where a weight is trained.
        native_layers: names of the layers that ran on the native kernels.
    """

    masks: dict[str, Tensor] | None = None
    native_layers: list[str] | None = None


def write_masks_beside(folder: Path, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Writes the masks of all pruned layers, under the names that the weights have in the folder."""
    prefix = _prefix(model)
    write_masks(folder / MASK_FILE, {name.removeprefix(prefix): mask for name, mask in masks.items()})


def read_sparse_state(folder: Path, model: nn.Module) -> SparseState:
    """Reads masks and native layers of a checkpoint, under the names that they have in `model`.

    Raises:
        CheckpointError: a file is damaged.
    """
    prefix = _prefix(model)
    masks = native = None
    try:
        if (folder / MASK_FILE).is_file():
            masks = {prefix + name: mask for name, mask in read_masks(folder / MASK_FILE).items()}
        if (folder / INFO_FILE).is_file():
            names = json.loads((folder / INFO_FILE).read_text(encoding="utf-8")).get(NATIVE_LAYERS)
            native = None if names is None else [prefix + str(name) for name in names]
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    return SparseState(masks, native)


def write_session(folder: Path, state: Mapping[str, Any]) -> None:
    """Writes the state of a `SparseSession`: its tensors (masks as bitmaps), and the rest as JSON in the header."""
    tensors: dict[str, Tensor] = {}
    rest = json.dumps(_set_aside(state, tensors, ""))
    save_file(tensors, folder / SESSION_FILE, {_SESSION_ENTRY: rest})


def read_session(folder: Path) -> dict[str, Any] | None:
    """Reads what `write_session` wrote; None if the run had no recipe.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not (folder / SESSION_FILE).is_file():
        return None
    try:
        with safe_open(folder / SESSION_FILE, framework="pt") as file:
            rest = json.loads((file.metadata() or {})[_SESSION_ENTRY])
            return _put_back(rest, {name: file.get_tensor(name) for name in file.keys()})
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / SESSION_FILE} is damaged: {error}") from error


def _set_aside(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """The value with tensors replaced by their names; they are collected in `tensors`."""
    if isinstance(value, Tensor):
        if value.dtype == torch.bool:
            tensors[path] = pack_bits(value)
            return {_TENSOR: path, "shape": list(value.shape)}
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: path}
    if isinstance(value, Mapping):
        return {str(name): _set_aside(each, tensors, f"{path}/{name}") for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_set_aside(each, tensors, f"{path}/{i}") for i, each in enumerate(value)]
    return value


def _put_back(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict) and _TENSOR in value:
        tensor = tensors[value[_TENSOR]]
        return unpack_bits(tensor, tuple(value["shape"])) if "shape" in value else tensor
    if isinstance(value, dict):
        return {name: _put_back(each, tensors) for name, each in value.items()}
    if isinstance(value, list):
        return [_put_back(each, tensors) for each in value]
    return value


def names_on_disk(model: nn.Module, names: list[str]) -> list[str]:
    """Layer names as `read_sparse_state` expects them in a file."""
    return [name.removeprefix(_prefix(model)) for name in names]


def _prefix(model: nn.Module) -> str:
    # A wrapped timm model is saved under timm's own names.
    return "timm_model." if isinstance(model, TimmWrapperForImageClassification) else ""


@contextmanager
def complete_folder(target: Path, *, writes: bool = True, wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A folder to fill that becomes `target` in one step when the block ends well, and disappears when it fails.

    Until then its name starts with an underscore: nothing that looks for checkpoints finds it, and an upload leaves
    it out. An earlier `target` is replaced.

    Args:
        writes: whether this process makes and renames the folder; the others fill it too.
        wait: called where all processes have to arrive before any goes on.

    Raises:
        CheckpointError: the folder cannot be written, for want of space for instance.
    """
    building = target.with_name(f"_saving-{target.name}")
    try:
        if writes:
            _remove(building)
            building.mkdir(parents=True)
        wait()
        yield building
        wait()
        if writes:
            _replace(building, target)
        wait()
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = _reason(error, target.parent)
        raise CheckpointError(
            f"checkpoint {str(target)!r} could not be written: {reason}; earlier checkpoints are untouched"
        ) from error
    finally:
        if writes:
            _remove(building)


def _replace(building: Path, target: Path) -> None:
    if not target.exists():
        os.rename(building, target)
        return
    # A folder that is not empty cannot be replaced in one step; moved aside it can be put back by hand.
    old = target.with_name(f"_old-{target.name}")
    _remove(old)
    os.rename(target, old)
    os.rename(building, target)
    _remove(old)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _reason(error: BaseException, place: Path) -> str:
    """torch and safetensors report a failed write in types of their own, torch even without the system's reason."""
    number = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"os error (\d+)", str(error)):
        number = int(found[1])
    if number in _FULL:
        return f"{_FULL[number]}; free some and resume from the last one"
    while not place.exists():
        place = place.parent
    if shutil.disk_usage(place).free < 2**20:
        return f"{_FULL[errno.ENOSPC]}; free some and resume from the last one"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The complete checkpoint of the highest step in `output_dir`, or None; incomplete ones are passed over."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return None
    by_step = {int(m[1]): p for p in folder.iterdir() if p.is_dir() and (m := _CHECKPOINT_NAME.fullmatch(p.name))}
    for step in sorted(by_step, reverse=True):
        missing = _missing(by_step[step])
        if not missing:
            return str(by_step[step])
        logger.warning("%s is not complete (no %s) and is passed over", by_step[step], missing)
    return None


def check_checkpoint(folder: str | Path) -> None:
    """Makes sure that training can be resumed from `folder`.

    Raises:
        CheckpointError: it does not exist or lacks a file.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(f"checkpoint {str(folder)!r}: no such folder")
    if missing := _missing(Path(folder)):
        raise CheckpointError(f"checkpoint {str(folder)!r} is not complete: it has no {missing}")


def _missing(folder: Path) -> str | None:
    if not (folder / TRAINER_STATE_NAME).is_file():
        return TRAINER_STATE_NAME
    if not any((folder / name).is_file() for name in (*WEIGHT_FILES, "pytorch_model.bin")):
        return WEIGHT_FILES[0]
    return None
