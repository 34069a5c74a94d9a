"""Positions of the compact form of a weight (docs/format.md), decoded by the native core."""

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class StoredWeight:
    """A weight as a file holds it, and where it goes.

    Attributes:
        code: uint8, of its positions.
        is_gaps: Whether that is a gap code; otherwise a bitmap.
        values: One-dimensional, of 2 or 4 bytes.
        dense: One-dimensional, of the same type, zero everywhere.
    """

    code: Tensor
    is_gaps: bool
    values: Tensor
    dense: Tensor

    def __post_init__(self) -> None:
        values, dense = self.values, self.dense
        if values.dtype != dense.dtype or values.element_size() not in (2, 4) or values.dim() != 1 != dense.dim():
            raise ValueError(f"{values.dtype} values do not go into a weight of {dense.dtype}")
        if not (values.is_contiguous() and dense.is_contiguous()):
            raise ValueError("values and weight must be contiguous")
        _check(self.code, len(values), len(dense))


def unpack(weights: Sequence[StoredWeight], threads: int) -> list[tuple[int, str | None]]:
    """Writes values to their positions, without Python's lock.

    Returns:
        For each weight how many of its values are zero, and what is wrong with its positions if anything is; it is
        left as it was then.
    """
    return _native.unpack(
        [
            (
                each.code.data_ptr(), each.code.numel(), each.is_gaps, each.values.data_ptr(), len(each.values),
                each.values.element_size(), each.dense.data_ptr(), len(each.dense),
            )
            for each in weights
        ],
        threads,
    )  # fmt: skip


def _check(code: Tensor, count: int, numel: int) -> None:
    if code.dtype != torch.uint8 or code.dim() != 1 or not code.is_contiguous():
        raise ValueError(f"positions are decoded from contiguous bytes, not {code.dtype} of shape {tuple(code.shape)}")
    if not 0 <= count <= numel <= MOST_ELEMENTS:
        raise ValueError(f"a weight of {numel} elements cannot have {count} positions")
