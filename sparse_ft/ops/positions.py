"""Positions of the compact form of a weight (docs/format.md), decoded by the native core."""

import torch
from torch import Tensor

from sparse_ft.ops import _native

MOST_ELEMENTS = 2**31 - 1  # of a weight: positions are int32


def decode_gaps(code: Tensor, count: int, numel: int) -> Tensor:
    """The `count` rising positions (int32) below `numel` that a gap code (uint8) holds.

    Raises:
        ValueError: It holds others, or other than so many.
    """
    _check(code, count, numel)
    positions = torch.empty(count, dtype=torch.int32)
    _native.decode_gaps(code.data_ptr(), code.numel(), count, numel, positions.data_ptr())
    return positions


def decode_bitmap(bitmap: Tensor, count: int, numel: int) -> Tensor:
    """The same of a bitmap (uint8) of ``ceil(numel / 8)`` bytes, lowest bit first."""
    _check(bitmap, count, numel)
    if bitmap.numel() != (numel + 7) // 8:
        raise ValueError(f"a bitmap of {numel} elements has {(numel + 7) // 8} bytes, not {bitmap.numel()}")
    positions = torch.empty(count, dtype=torch.int32)
    _native.decode_bitmap(bitmap.data_ptr(), numel, count, positions.data_ptr())
    return positions


def scatter(values: Tensor, positions: Tensor, dense: Tensor) -> int:
    """Writes values to positions (int32) of the flattened `dense`, which is contiguous and of their type.

    Returns:
        How many of the values are zero.

    Raises:
        ValueError: The types differ or have no 2 or 4 bytes, there are not as many values as positions, or a position
            is not in `dense`.
    """
    if values.dtype != dense.dtype or values.element_size() not in (2, 4) or values.shape != positions.shape:
        raise ValueError(f"{values.numel()} {values.dtype} do not go to {positions.numel()} places of {dense.dtype}")
    if positions.dtype != torch.int32 or not all(each.is_contiguous() for each in (values, positions, dense)):
        raise ValueError("positions must be int32, and everything contiguous")
    zeros = _native.scatter(
        positions.data_ptr(), positions.numel(), values.element_size(), values.data_ptr(), dense.numel(),
        dense.data_ptr(),
    )  # fmt: skip
    if zeros < 0:
        raise ValueError(f"a position is beyond the {dense.numel()} elements of the weight")
    return zeros


def _check(code: Tensor, count: int, numel: int) -> None:
    if code.dtype != torch.uint8 or code.dim() != 1 or not code.is_contiguous():
        raise ValueError(f"positions are decoded from contiguous bytes, not {code.dtype} of shape {tuple(code.shape)}")
    if not 0 <= count <= numel <= MOST_ELEMENTS:
        raise ValueError(f"a weight of {numel} elements cannot have {count} positions")
