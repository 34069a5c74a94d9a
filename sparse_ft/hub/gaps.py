"""Positions of nonzeros as gaps in a Golomb-Rice code, which comes within a few percent of their entropy.

The gap before a position is the number of elements between it and the position before. With a remainder of `r` bits,
gap = q * 2**r + remainder. The code of `k` positions is one byte `r`, the `k` remainders in `r` bits each, and the
quotients in unary, each `q` zeros and a one; remainders and quotients each begin on a byte, bits lowest first. They
are two planes, not one stream, so that the places of remainders are known and a decoder looks at 64 quotient bits at
once. (S. W. Golomb, "Run-length encodings", IEEE Trans. Inf. Theory 1966; R. F. Rice, JPL 79-22, 1979.)

Whatever the pattern, the code of `k` of `n` elements takes at most k * (1 + r) + (n - k) / 2**r bits and 3 bytes. No
order but a rising one can be written in it.
"""

import math

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparse_ft.ops.positions import decode_gaps

MAX_SPREAD = 1024  # elements per nonzero, at most: what a small file can make a reader allocate is bounded
_MAX_REMAINDER = 16
_BLOCK = 2**12  # gaps; a multiple of 8, so that the remainders of a block end on a byte


def encode(positions: NDArray[np.int64], numel: int) -> NDArray[np.uint8]:
    """The code of rising `positions` below `numel`, of which there is at least one in `MAX_SPREAD`."""
    gaps = np.diff(positions, prepend=-1) - 1
    remainder = _best_remainder(gaps, numel)
    quotients = gaps >> remainder
    ends = np.cumsum(quotients + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, dtype=np.uint8)
    unary[ends] = 1
    return np.concatenate(
        [np.array([remainder], dtype=np.uint8), _pack(gaps, remainder), np.packbits(unary, bitorder="little")]
    )


def decode(code: Tensor, count: int, numel: int) -> Tensor:
    """The `count` positions (int32) of a code, rising and below `numel`.

    Raises:
        ValueError: The code is not one of `count` positions below `numel`.
    """
    check_count(count, numel)
    return decode_gaps(code, count, numel)


def check_count(count: int, numel: int) -> None:
    """Raise ValueError unless `count` of `numel` positions are stored as gaps."""
    if not 0 < count <= numel <= MAX_SPREAD * count:
        raise ValueError(f"{count} of {numel} positions are not stored as gaps")


def _best_remainder(gaps: NDArray[np.int64], numel: int) -> int:
    """The remainder's width of the shortest code."""
    guess = max(0, int(math.log2(max(1.0, numel / len(gaps)))))
    widths = range(max(0, guess - 2), min(_MAX_REMAINDER, guess + 2) + 1)
    return min(widths, key=lambda width: len(gaps) * width + int((gaps >> width).sum()))


def _pack(gaps: NDArray[np.int64], width: int) -> NDArray[np.uint8]:
    """The lowest `width` bits of each gap, one after the other."""
    shifts = np.arange(width, dtype=np.int64)
    blocks = [
        np.packbits(((gaps[start : start + _BLOCK, None] >> shifts) & 1).astype(np.uint8), bitorder="little")
        for start in range(0, len(gaps), _BLOCK)
    ]
    return np.concatenate(blocks)
