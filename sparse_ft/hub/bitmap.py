"""Masks as bitmaps, one bit per weight, and safetensors files that hold them; checked before they are believed."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import one_line

MAX_ELEMENTS = 2**31 - 1  # of one weight: positions inside a weight are 32-bit numbers everywhere in the package
MAX_DIMENSIONS = 8
VERSION = "1"
MASK_FORMAT = "sparse_ft.masks"
MASK_FILE = "sparse_masks.safetensors"  # beside model.safetensors

_ONES_IN_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


@dataclass(frozen=True)
class SparseEntry:
    """What a file says about one sparse weight, checked, before anything of its dense size is allocated."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None  # of the dense weight; None in a file that holds masks alone

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def pack_bits(mask: Tensor) -> Tensor:
    """uint8 tensor of ceil(numel / 8) bytes: row-major, lowest bit first, unused bits of the last byte zero."""
    return torch.from_numpy(np.packbits(mask.cpu().reshape(-1).numpy(), bitorder="little"))


def count_ones(bitmap: Tensor) -> int:
    return int(_ONES_IN_BYTE[bitmap.numpy()].sum(dtype=np.int64))


def unpack_bits(bitmap: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_bits`, as a bool tensor of `shape`.

    Raises:
        ValueError: Ones after the last element; that bitmap was made for another shape.
    """
    numel = math.prod(shape)
    if numel % 8 and int(bitmap[-1]) >> (numel % 8):
        raise ValueError("the bitmap has ones after the last element of the weight")
    bits = np.unpackbits(bitmap.numpy(), count=numel, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).view(shape)


def check_shape(shape: Any) -> None:
    """Raise ValueError unless `shape` is one that a sparse weight may have."""
    if (
        not isinstance(shape, list | tuple)
        or not 1 <= len(shape) <= MAX_DIMENSIONS
        or not all(type(size) is int and 0 < size <= MAX_ELEMENTS for size in shape)
        or math.prod(shape) > MAX_ELEMENTS
    ):
        raise ValueError(
            f"a sparse weight has 1 to {MAX_DIMENSIONS} positive dimensions and at most {MAX_ELEMENTS} elements, "
            f"not shape {str(shape)[:80]}"
        )


def write_masks(path: str | Path, masks: Mapping[str, Tensor]) -> None:
    """Write bool masks by weight name (of the dense weights' shapes) to a safetensors file, one bit per weight."""
    for name, mask in masks.items():
        check_shape(mask.shape)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask {name!r} must be bool, not {mask.dtype}")
    shapes = {name: {"shape": list(mask.shape)} for name, mask in masks.items()}
    save_file({f"{name}.bitmap": pack_bits(mask) for name, mask in masks.items()}, path, header(MASK_FORMAT, shapes))


def read_masks(path: str | Path) -> dict[str, Tensor]:
    """Masks that `write_masks` wrote.

    Raises:
        ValueError: The file is not safetensors, not of this format or version, or contradicts itself.
    """
    with open_safetensors(path) as file:
        entries = read_entries(path, file, MASK_FORMAT)
        try:
            return {name: unpack_bits(file.get_tensor(f"{name}.bitmap"), e.shape) for name, e in entries.items()}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def header(format_name: str, weights: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The ``__metadata__`` of a file that holds bitmaps; `read_entries` is its reader."""
    return {
        "format": "pt",
        "sparse_ft.format": format_name,
        "sparse_ft.version": VERSION,
        "sparse_ft.weights": json.dumps(weights),
    }


def open_safetensors(path: str | Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({one_line(error)})") from error


def read_entries(path: str | Path, file: Any, format_name: str) -> dict[str, SparseEntry]:
    """The sparse weights that an open file announces, each with a bitmap of the length its shape asks for."""
    metadata = file.metadata() or {}
    if metadata.get("sparse_ft.format") != format_name:
        raise ValueError(f"{path}: metadata sparse_ft.format must be {format_name!r}")
    if metadata.get("sparse_ft.version") != VERSION:
        found = metadata.get("sparse_ft.version")
        raise ValueError(f"{path}: {format_name} version {found!r:.40}; this sparse_ft reads version {VERSION!r}")
    try:
        announced = json.loads(metadata.get("sparse_ft.weights", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: metadata sparse_ft.weights is not JSON") from error
    if not isinstance(announced, dict) or not all(isinstance(entry, dict) for entry in announced.values()):
        raise ValueError(f"{path}: metadata sparse_ft.weights must map each weight's name to its shape and dtype")
    names = set(file.keys())
    entries = {}
    for name, entry in announced.items():
        try:
            entries[name] = _checked_entry(name, entry, names, file)
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
    return entries


def _checked_entry(name: str, entry: dict[str, Any], names: set[str], file: Any) -> SparseEntry:
    shape = entry.get("shape")
    check_shape(shape)
    assert isinstance(shape, list)
    numel = math.prod(shape)
    if name in names:
        raise ValueError("stored both as a dense and as a sparse tensor")
    if f"{name}.bitmap" not in names:
        raise ValueError("its bitmap is missing")
    bitmap = file.get_slice(f"{name}.bitmap")
    if bitmap.get_dtype() != "U8" or bitmap.get_shape() != [(numel + 7) // 8]:
        raise ValueError(
            f"shape {shape} needs a bitmap of type U8 and shape [{(numel + 7) // 8}], "
            f"not {bitmap.get_dtype()} {bitmap.get_shape()}"
        )
    dtype = entry.get("dtype")
    if dtype not in (None, "float32", "float16", "bfloat16"):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, not {dtype!r:.40}")
    return SparseEntry(tuple(shape), getattr(torch, dtype) if dtype else None)
