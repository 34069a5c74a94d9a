"""What the safetensors files of this package say in their ``__metadata__``: a format, its version, sparse weights."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .errors import one_line

MAX_ELEMENTS = 2**31 - 1  # of one weight: positions inside a weight are 32-bit numbers everywhere in the package
MAX_DIMENSIONS = 8


def header(format_name: str, version: str, weights: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The ``__metadata__`` of a file; `read_header` is its reader."""
    return {
        "format": "pt",
        "sparse_ft.format": format_name,
        "sparse_ft.version": version,
        "sparse_ft.weights": json.dumps(weights),
    }


def read_header(
    where: str | Path, metadata: Mapping[str, str] | None, format_name: str, versions: Sequence[str]
) -> tuple[str, dict[str, dict[str, Any]]]:
    """The version of a file, and for each sparse weight what it says of it; shapes are checked, nothing else.

    Raises:
        ValueError: Another format, a version that is not among `versions`, or no such metadata; the message begins
            with `where`.
    """
    metadata = metadata or {}
    if metadata.get("sparse_ft.format") != format_name:
        raise ValueError(f"{where}: metadata sparse_ft.format must be {format_name!r}")
    version = metadata.get("sparse_ft.version", "")
    if version not in versions:
        known = " and ".join(repr(each) for each in versions)
        raise ValueError(f"{where}: {format_name} version {version!r:.40}; this sparse_ft reads version {known}")
    try:
        weights = json.loads(metadata.get("sparse_ft.weights", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: metadata sparse_ft.weights is not JSON") from error
    if not isinstance(weights, dict) or not all(isinstance(entry, dict) for entry in weights.values()):
        raise ValueError(f"{where}: metadata sparse_ft.weights must map each weight's name to its shape and dtype")
    for name, entry in weights.items():
        try:
            check_shape(entry.get("shape"))
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {error}") from error
    return version, weights


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


def open_safetensors(path: str | Path) -> Any:
    """`safetensors.safe_open` whose errors are ValueErrors that name the file."""
    try:
        return safe_open(str(path), framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file ({one_line(error)})") from error


def tensor_headers(file: Any) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of each tensor of an open file, without reading one."""
    slices = {name: file.get_slice(name) for name in file.keys()}
    return {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
