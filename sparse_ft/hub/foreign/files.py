"""The tensors of a checkpoint file. Pickles are read by torch's `weights_only` unpickler, which runs no code."""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparse_ft.hub.errors import ModelError, one_line

CHECKPOINT_SUFFIXES = (".safetensors", ".index.json", ".pth", ".pt", ".th", ".bin", ".ckpt", ".tar")
# Where training scripts put the weights among other things; an average of them (EMA) only if there is nothing else.
_NESTED = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "module",
    "state_dict_ema",
    "model_ema",
    "ema",
)
_MAX_INDEX_BYTES = 64 * 2**20


@dataclass
class FileContent:
    """What a checkpoint file holds; `recipe` is the text that SparseML puts beside the weights."""

    state_dict: dict[str, Tensor]
    recipe: str | None = None


def read_file(path: Path) -> FileContent:
    """Read all tensors of a file.

    Raises:
        ModelError: The file is not there, damaged, holds no tensors, or objects that only code could rebuild.
    """
    if not path.is_file():
        raise ModelError(f"there is no checkpoint file {path}")
    if path.name.endswith(".index.json"):
        return FileContent(_read_shards(path))
    if path.suffix == ".safetensors":
        return FileContent(_read_safetensors(path))
    return _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {one_line(error)}") from error


def _read_shards(index: Path) -> dict[str, Tensor]:
    state_dict: dict[str, Tensor] = {}
    names = read_index(index)
    for file in sorted(set(names.values())):
        shard = read_file(index.parent / file).state_dict
        state_dict |= {name: tensor for name, tensor in shard.items() if names.get(name) == file}
    if missing := sorted(names.keys() - state_dict.keys()):
        raise ModelError(f"{index}: the shards lack {missing[0]}{_and_more(missing)}")
    return state_dict


def read_index(index: Path) -> dict[str, str]:
    """File name of each tensor, from the ``.index.json`` of shards.

    Raises:
        ModelError: It is not an index, or it names a file outside its own folder.
    """
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ModelError(f"{index} is larger than {_MAX_INDEX_BYTES >> 20} MiB, which no index is")
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = dict(weight_map.items())
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, OSError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{index} is not an index of weight files: {one_line(error)}") from error
    for name, file in items.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith((".safetensors", ".bin")):
            raise ModelError(
                f"{index}: {name!r:.80} is said to be in {file!r:.80}; only weight files beside the index are read"
            )
    return items


def _read_pickle(path: Path) -> FileContent:
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors and plain values ({_unknown_class(error)}), which only running code from "
            "the file could rebuild; where it was made, save model.state_dict() alone"
        ) from error
    except Exception as error:  # the reader raises about any type for a damaged file
        raise ModelError(f"{path} is not a checkpoint that torch can read: {one_line(error)}") from error
    recipe = content.get("recipe") if isinstance(content, Mapping) else None
    state_dict = _find_state_dict(content, path)
    _check_extents(state_dict, path)
    return FileContent(state_dict, recipe if isinstance(recipe, str) else None)


def _check_archive(path: Path) -> None:
    """Refuse archives whose parts unpack to more than they take: torch writes them without compression."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [part.filename for part in archive.infolist() if part.file_size > part.compress_size]
            unpacked = sum(part.file_size for part in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise ModelError(f"{path} is damaged: {one_line(error)}") from error
    if packed:
        raise ModelError(f"{path}: its part {packed[0]!r} is compressed, which torch never writes")
    if unpacked > path.stat().st_size:
        raise ModelError(f"{path}: its parts announce {unpacked} bytes, more than the file has")


def _unknown_class(error: Exception) -> str:
    """What the safe reader stumbled over, which its long advice names somewhere."""
    found = re.search(r"(?:unsupported global: GLOBAL|unsupported GLOBAL|Unsupported class) (\S+)", str(error), re.I)
    return found[1] if found else "a pickle that torch's safe reader refuses"


def _find_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(3):  # {"model": {"state_dict": ...}} occurs
        if not isinstance(content, Mapping):
            break
        named = {name: value for name, value in content.items() if isinstance(name, str)}
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        inner = next((named[name] for name in _NESTED if isinstance(named.get(name), Mapping)), None)
        if inner is None:
            if not tensors:
                break
            return tensors
        content = inner
    raise ModelError(f"{path} holds no state dict: neither tensors by name nor an entry {', '.join(_NESTED[:4])}")


def _check_extents(state_dict: Mapping[str, Tensor], path: Path) -> None:
    for name, tensor in state_dict.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise ModelError(f"{path}: {name} is not an ordinary dense tensor ({tensor.layout})")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ModelError(f"{path}: {name} has shape {tuple(tensor.shape)}, but not so many numbers in the file")


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def read_recipe(path: str | Path) -> str | None:
    """Text of the recipe that SparseML put into a ``.pth`` beside the weights; None if there is none.

    Raises:
        ModelError: as `read_file`.
    """
    return read_file(Path(path)).recipe
