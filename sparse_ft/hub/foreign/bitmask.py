"""Repositories of Neural Magic and llm-compressor: compressed-tensors' ``sparse-bitmask`` and ``sparse-24-bitmask``.

Their own reader went with compressed-tensors 0.15. For a weight ``X.weight`` there are ``X.shape``; ``X.bitmask``,
one bit a weight, each row of the last dimension padded to whole bytes, lowest bit first; ``X.compressed``, the values
where the bits are one, in order; and in ``sparse-bitmask`` ``X.row_offsets``, which add nothing to the bits.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_ft.hub.bitmap import count_ones
from sparse_ft.hub.errors import ModelError
from sparse_ft.hub.header import check_shape, open_safetensors

from .files import read_index

FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
_CONFIG_ENTRIES = ("quantization_config", "compression_config")
_PARTS = (".shape", ".compressed", ".bitmask", ".row_offsets")
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def sparsity_format(config: Mapping[str, Any], where: str) -> str | None:
    """The format of the weights that a config.json announces: one of `FORMATS`, or None for plain tensors.

    Raises:
        ModelError: The weights are quantised, or of a sparse format that is not known.
    """
    entry = next((config[name] for name in _CONFIG_ENTRIES if isinstance(config.get(name), dict)), config)
    sparsity = entry.get("sparsity_config")
    if not isinstance(sparsity, dict):
        return None
    if entry.get("config_groups"):
        raise ModelError(f"{where}/config.json: the weights are quantised; only floating point can be read")
    found = sparsity.get("format")
    if found in FORMATS:
        return found
    if found in (None, "dense"):
        return None
    raise ModelError(f"{where}/config.json: sparsity format {found!r:.60} is not known; known: {', '.join(FORMATS)}")


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dense state dict of a folder in one of `FORMATS`, and the masks that keep a weight which is 0.0.

    Memory of dense size is allocated for a weight once its parts agree with its shape.

    Raises:
        ModelError: A file is damaged or contradicts itself.
    """
    index = folder / "model.safetensors.index.json"
    places = read_index(index) if index.is_file() else None
    state_dict: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    try:
        for file in sorted(set(places.values())) if places is not None else ["model.safetensors"]:
            _read_file(folder / file, state_dict, masks)
    except (ValueError, OSError) as error:
        raise ModelError(str(error)) from error
    return state_dict, masks


def _read_file(path: Path, state_dict: dict[str, Tensor], masks: dict[str, Tensor]) -> None:
    with open_safetensors(path) as file:
        names = set(file.keys())
        stems = sorted(name.removesuffix(".bitmask") for name in names if name.endswith(".bitmask"))
        parts = {f"{stem}{part}" for stem in stems for part in _PARTS}
        for name in sorted(names - parts):
            state_dict[name] = file.get_tensor(name)
        for stem in stems:
            weight = f"{stem}.weight"
            if weight in state_dict:
                raise ModelError(f"{path}: {weight} is there twice")
            try:
                state_dict[weight], mask = _weight(file, stem, names)
            except ValueError as error:
                raise ModelError(f"{path}: {weight}: {error}") from error
            if bool(torch.any(state_dict[weight][mask] == 0)):
                masks[weight] = mask


def _weight(file: Any, stem: str, names: set[str]) -> tuple[Tensor, Tensor]:
    for part in _PARTS[:3]:
        if f"{stem}{part}" not in names:
            raise ValueError(f"its {part.removeprefix('.')} is missing")
    declared = file.get_slice(f"{stem}.shape")
    if declared.get_dtype() != "I64" or math.prod(declared.get_shape()) > 8:
        raise ValueError(f"its shape must be at most 8 numbers of type I64, not {declared.get_dtype()}")
    shape = file.get_tensor(f"{stem}.shape").flatten().tolist()
    check_shape(shape)
    bits = file.get_slice(f"{stem}.bitmask")
    expected = [*shape[:-1], -(-shape[-1] // 8)]
    if bits.get_dtype() != "U8" or bits.get_shape() != expected:
        raise ValueError(
            f"shape {shape} needs a bitmask of type U8 and shape {expected}, not {bits.get_dtype()} {bits.get_shape()}"
        )
    values = file.get_slice(f"{stem}.compressed")
    if values.get_dtype() not in _DTYPES:
        raise ValueError(f"its values are of type {values.get_dtype()}; known: {', '.join(_DTYPES)}")
    bitmask = file.get_tensor(f"{stem}.bitmask")
    ones, count = count_ones(bitmask), math.prod(values.get_shape())
    if ones != count:
        raise ValueError(f"the bitmask has {ones} ones, but there are {count} values")
    if shape[-1] % 8 and bool((bitmask[..., -1] >> (shape[-1] % 8)).any()):
        raise ValueError("the bitmask has ones after the end of a row")
    unpacked = np.unpackbits(bitmask.numpy(), axis=-1, count=shape[-1], bitorder="little")
    mask = torch.from_numpy(unpacked.view(np.bool_))
    dense = torch.zeros(shape, dtype=_DTYPES[values.get_dtype()])
    dense[mask] = file.get_tensor(f"{stem}.compressed").flatten()
    return dense, mask
