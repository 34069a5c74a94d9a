"""The compact form of a checkpoint: only the values of sparse weights, and one bit per weight for their places.

``docs/format.md`` is the specification. A sparse weight ``w`` of `n` elements, `k` of them in its mask, becomes two
one-dimensional tensors of a safetensors file: ``w.values`` (`k` numbers, row-major order) and ``w.bitmap``
(ceil(`n` / 8) bytes). Everything else is stored as it is. The mask is stored, not the nonzeros: a weight that is in
the mask and happens to be 0.0 is still in the mask after a round trip.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bitmap import (
    SparseEntry,
    check_shape,
    count_ones,
    header,
    open_safetensors,
    pack_bits,
    read_entries,
    unpack_bits,
)

COMPACT_FORMAT = "sparse_ft.compact"
COMPACT_FILE = "sparse/model.safetensors"  # below the folder of a checkpoint
_DTYPE_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def pack(
    state_dict: Mapping[str, Tensor], masks: Mapping[str, Tensor], *, values_dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Compact tensors and safetensors metadata of a state dict in dense layout.

    Args:
        state_dict: Dense tensors by name.
        masks: For each weight to store sparsely, a bool tensor of its shape, True where it may be nonzero.
        values_dtype: float16 or bfloat16 stores the values of float32 weights in 2 bytes instead of 4, rounded;
            None keeps them exact.

    Raises:
        ValueError: A mask without a weight or of another shape, a nonzero outside its mask, a weight that is not
            floating point or does not fit `values_dtype`, or a tensor whose name the compact form needs.
    """
    if values_dtype not in (None, *_DTYPE_CODES):
        raise ValueError(f"values_dtype must be float32, float16 or bfloat16, not {values_dtype}")
    tensors = {name: tensor.contiguous() for name, tensor in state_dict.items() if name not in masks}
    entries: dict[str, dict[str, Any]] = {}
    for name, mask in masks.items():
        if name not in state_dict:
            raise ValueError(f"mask {name!r} has no weight of that name in the state dict")
        weight = state_dict[name].detach()
        _check_weight(name, weight, mask)
        for part in (f"{name}.values", f"{name}.bitmap"):
            if part in state_dict:
                raise ValueError(f"tensor {part!r} has a name that the compact form of {name!r} needs")
        values = weight[mask]
        if values_dtype is not None and values_dtype != weight.dtype:
            if weight.dtype != torch.float32:
                raise ValueError(f"weight {name!r} is {weight.dtype} already; leave values_dtype out")
            rounded = values.to(values_dtype)
            if torch.any(rounded.isinf() & ~values.isinf()):
                raise ValueError(f"weight {name!r} has values beyond the range of {values_dtype}")
            values = rounded
        tensors[f"{name}.values"] = values
        tensors[f"{name}.bitmap"] = pack_bits(mask)
        entries[name] = {"shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}
    return tensors, header(COMPACT_FORMAT, entries)


def unpack(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dense state dict and masks of a compact file.

    The file is checked before memory of dense size is allocated: every sparse weight must have exactly the bitmap
    bytes that its shape asks for, and as many values as the bitmap has ones.

    Raises:
        ValueError: The file is not safetensors, not of this format or version, or contradicts itself.
    """
    with open_safetensors(path) as file:
        entries = _entries(path, file)
        state_dict = {name: file.get_tensor(name) for name in _dense_names(file, entries)}
        masks = {}
        for name, entry in entries.items():
            values, bitmap = file.get_tensor(f"{name}.values"), file.get_tensor(f"{name}.bitmap")
            ones = count_ones(bitmap)
            if ones != len(values):
                raise ValueError(f"{path}: {name}: the bitmap has {ones} ones, but there are {len(values)} values")
            try:
                masks[name] = unpack_bits(bitmap, entry.shape)
            except ValueError as error:
                raise ValueError(f"{path}: {name}: {error}") from error
            state_dict[name] = torch.zeros(entry.shape, dtype=entry.dtype)
            state_dict[name][masks[name]] = values.to(entry.dtype)
    return state_dict, masks


def _check_weight(name: str, weight: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"mask {name!r} must be a bool tensor of shape {tuple(weight.shape)}, "
            f"not {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if weight.dtype not in _DTYPE_CODES:
        raise ValueError(f"weight {name!r} is {weight.dtype}; only float32, float16 and bfloat16 can be sparse")
    check_shape(weight.shape)
    if torch.any(weight[~mask]):
        raise ValueError(f"weight {name!r} has nonzero values outside its mask: apply the mask before packing")


def _dense_names(file: Any, entries: Mapping[str, SparseEntry]) -> list[str]:
    parts = {f"{name}{suffix}" for name in entries for suffix in (".values", ".bitmap")}
    return [name for name in file.keys() if name not in parts]


def _entries(path: str | Path, file: Any) -> dict[str, SparseEntry]:
    entries = read_entries(path, file, COMPACT_FORMAT)
    names = set(file.keys())
    for name, entry in entries.items():
        if entry.dtype is None:
            raise ValueError(f"{path}: {name}: its dtype is missing")
        if f"{name}.values" not in names:
            raise ValueError(f"{path}: {name}: its values are missing")
        values = file.get_slice(f"{name}.values")
        allowed = set(_DTYPE_CODES.values()) if entry.dtype == torch.float32 else {_DTYPE_CODES[entry.dtype]}
        if len(values.get_shape()) != 1 or values.get_dtype() not in allowed:
            raise ValueError(
                f"{path}: {name}: values of a {entry.dtype} weight must be one-dimensional of type "
                f"{' or '.join(sorted(allowed))}, not {values.get_dtype()} {values.get_shape()}"
            )
    return entries
