"""Safetensors files written tensor by tensor: of a model in native sparse form, only one weight is dense at a time."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from sparse_ft.nn import SparseModule

from .compact_folder import WEIGHTS, WEIGHTS_INDEX
from .errors import ModelError

MAX_SHARD_SIZE = "5GB"
_SHOW_PROGRESS = 2**28  # bytes; less is written in a moment
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_CODES = {  # in safetensors' order, by which a file's tensors are sorted, wide ones first
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: what the header says of it, and where it comes from when its turn has come."""

    shape: torch.Size
    dtype: torch.dtype
    get: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Stored":
        return cls(tensor.shape, tensor.dtype, lambda: tensor)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def stored_tensors(model: nn.Module) -> dict[str, Stored]:
    """The state dict of a model; weights of sparse layers become dense when they are asked for.

    Names that share a parameter share an entry.
    """
    layers = {f"{name}.weight".lstrip("."): m for name, m in model.named_modules() if isinstance(m, SparseModule)}
    with SparseModule.values_in_state_dict():
        state = model.state_dict(keep_vars=True)
    entries: dict[int, Stored] = {}
    stored = {}
    for name, tensor in state.items():
        layer = layers.get(name)
        if layer is not None:
            stored[name] = Stored(layer.dense_shape, tensor.dtype, layer.dense_weight)
        else:
            stored[name] = entries.setdefault(id(tensor), Stored.of(tensor.detach()))
    return stored


def size_in_bytes(text: str | int) -> int:
    """Bytes of a size such as ``"5GB"``, ``"500MB"`` or a number.

    Raises:
        ModelError: Another text, or nothing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip(), re.I)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ModelError(f"a size reads 5GB, 500MB or the like, not {text!r}")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def write_weights(folder: Path, tensors: Mapping[str, Stored], max_shard_size: int | None = None) -> None:
    """Write ``model.safetensors``, or shards of at most so many bytes (or one tensor) and their index.

    Args:
        folder: where they are written.
        tensors: by name; two names of one entry are two tensors of the file.
        max_shard_size: None writes one file.
    """
    shards = _split(tensors, max_shard_size)
    total = sum(tensor.bytes for tensor in tensors.values())
    with transformers_logging.tqdm(
        total=total, unit="B", unit_scale=True, desc="Writing weights", disable=total < _SHOW_PROGRESS
    ) as progress:
        if len(shards) == 1:
            write_file(folder / WEIGHTS, tensors, progress.update)
            return
        places: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_file(folder / file, {name: tensors[name] for name in names}, progress.update)
            places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(
    path: Path, tensors: Mapping[str, Stored], progress: Callable[[int], object] = lambda size: None
) -> None:
    """Write one file with the same bytes as safetensors' `save_file`, holding one tensor at a time.

    Raises:
        ModelError: A tensor of a type that is not stored.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _CODES:
            raise ModelError(f"{name} is of type {tensor.dtype}, which is not stored")
    # As safetensors does: by type, wide ones first, so that every tensor is aligned; then by name.
    rank = {dtype: place for place, dtype in enumerate(_CODES)}
    names = sorted(tensors, key=lambda name: (-rank[tensors[name].dtype], name))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.bytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            data = tensors[name].get().detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            if len(data) != tensors[name].bytes:
                raise ModelError(f"{name} changed while it was written")
            file.write(data.numpy().data)
            progress(len(data))


def _split(tensors: Mapping[str, Stored], most: int | None) -> list[list[str]]:
    """Names by file, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if most is not None and shards[-1] and size + tensor.bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.bytes
    return shards
