"""Masks as bitmaps, one bit per weight, and the safetensors file that holds them; checked before they are believed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from .header import check_shape, header, open_safetensors, read_header, tensor_headers

VERSION = "1"
MASK_FORMAT = "sparse_ft.masks"
MASK_FILE = "sparse_masks.safetensors"  # beside model.safetensors

_ONES_IN_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


def pack_bits(mask: Tensor) -> Tensor:
    """uint8 tensor of ceil(numel / 8) bytes: row-major, lowest bit first, unused bits of the last byte zero."""
    return torch.from_numpy(np.packbits(mask.cpu().reshape(-1).numpy(), bitorder="little"))


def unpack_bits(bitmap: Tensor, shape: Sequence[int]) -> Tensor:
    """Inverse of `pack_bits`, as a bool tensor of `shape`.

    Raises:
        ValueError: Ones after the last element; that bitmap was made for another shape.
    """
    numel = math.prod(shape)
    if numel % 8 and int(bitmap[-1]) >> (numel % 8):
        raise ValueError("the bitmap has ones after the last element of the weight")
    bits = np.unpackbits(bitmap.numpy(), count=numel, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).view(tuple(shape))


def count_ones(bitmap: Tensor) -> int:
    return int(_ONES_IN_BYTE[bitmap.numpy()].sum(dtype=np.int64))


def check_bitmap(name: str, shape: Sequence[int], tensors: Mapping[str, tuple[str, list[int]]]) -> None:
    """Raise ValueError unless the file has a tensor `name` of the size that the bitmap of a weight of `shape` has."""
    size = (math.prod(shape) + 7) // 8
    if name not in tensors:
        raise ValueError("its bitmap is missing")
    dtype, found = tensors[name]
    if dtype != "U8" or found != [size]:
        raise ValueError(
            f"shape {list(shape)} needs a bitmap of type U8 and shape [{size}], not {dtype} {str(found)[:80]}"
        )


def write_masks(path: str | Path, masks: Mapping[str, Tensor]) -> None:
    """Write bool masks by weight name (of the dense weights' shapes) to a safetensors file, one bit per weight."""
    for name, mask in masks.items():
        check_shape(mask.shape)
        if mask.dtype != torch.bool:
            raise ValueError(f"mask {name!r} must be bool, not {mask.dtype}")
    shapes = {name: {"shape": list(mask.shape)} for name, mask in masks.items()}
    bitmaps = {f"{name}.bitmap": pack_bits(mask) for name, mask in masks.items()}
    save_file(bitmaps, path, header(MASK_FORMAT, VERSION, shapes))


def read_masks(path: str | Path) -> dict[str, Tensor]:
    """Masks that `write_masks` wrote.

    Raises:
        ValueError: The file is not safetensors, not of this format or version, or contradicts itself.
    """
    masks = {}
    with open_safetensors(path) as file:
        _, weights = read_header(path, file.metadata(), MASK_FORMAT, [VERSION])
        tensors = tensor_headers(file)
        for name, entry in weights.items():
            try:
                check_bitmap(f"{name}.bitmap", entry["shape"], tensors)
                masks[name] = unpack_bits(file.get_tensor(f"{name}.bitmap"), entry["shape"])
            except ValueError as error:
                raise ValueError(f"{path}: {name}: {error}") from error
    return masks
