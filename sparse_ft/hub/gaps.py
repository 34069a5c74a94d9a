"""Positions of nonzeros as gaps in a Golomb-Rice code, which comes within a few percent of their entropy.

The gap before a position is the number of elements between it and the position before. With a remainder of `r` bits,
gap = q * 2**r + remainder. The code of `k` positions is one byte `r`, the `k` remainders in `r` bits each, and the
quotients in unary, each `q` zeros and a one; remainders and quotients each begin on a byte, bits lowest first. Two
planes, not one stream, so that decoding is a handful of array operations. (S. W. Golomb, "Run-length encodings", IEEE
Trans. Inf. Theory 1966; R. F. Rice, JPL 79-22, 1979.)

Whatever the pattern, the code of `k` of `n` elements takes at most k * (1 + r) + (n - k) / 2**r bits and 3 bytes. No
order but a rising one can be written in it.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_SPREAD = 1024  # elements per nonzero, at most: what a small file can make a reader allocate is bounded
_MAX_REMAINDER = 16
_BLOCK = 2**12  # bytes; a multiple of 8, so that a block of as many remainders ends on a byte


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


def decode(code: NDArray[np.uint8], count: int, numel: int) -> Iterator[NDArray[np.int64]]:
    """The `count` positions of a code, rising and below `numel`, in pieces that stay in the processor's caches.

    What has been given before an error is raised was within these bounds, too.

    Raises:
        ValueError: The code is not one of `count` positions below `numel`.
    """
    if not 0 < count <= numel <= MAX_SPREAD * count:
        raise ValueError(f"{count} of {numel} positions are not stored as gaps")
    width = int(code[0]) if len(code) else _MAX_REMAINDER + 1
    if width > _MAX_REMAINDER:
        raise ValueError(f"the code of its gaps does not begin with a number of bits from 0 to {_MAX_REMAINDER}")
    split = 1 + (count * width + 7) // 8
    shortest, longest = (count + 7) // 8, (count + (numel >> width) + 7) // 8
    if not split + shortest <= len(code) <= split + longest or not code[-1]:
        raise ValueError(f"the code of its gaps has {len(code)} bytes, which are not {count} gaps below {numel}")
    remainders, unary = code[1:split], code[split:]
    found, total = 0, 0  # how many positions so far, and the sum of their remainders
    for start in range(0, len(unary), _BLOCK):
        bits = np.unpackbits(unary[start : start + _BLOCK], bitorder="little").view(np.bool_)
        places = np.flatnonzero(bits)  # as bool ten times as fast
        if found + len(places) > count:
            raise ValueError(f"the code of its gaps holds more than the {count} gaps that are needed")
        if not len(places):
            continue
        # A position has before it: the positions before, and their gaps with its own. The quotients of these are the
        # zeros before its one.
        numbers = np.arange(found, found + len(places))
        places += 8 * start
        places -= numbers
        places <<= width
        places += numbers
        if width:
            sums = np.cumsum(_unpack(remainders, found, len(places), width), dtype=np.int64)
            places += sums + total
            total += int(sums[-1])
        found += len(places)
        if places[-1] >= numel:
            raise ValueError(f"the code of its gaps goes to element {places[-1]} of {numel}")
        yield places
    if found < count:
        raise ValueError(f"the code of its gaps holds {found} gaps where {count} are needed")


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


def _unpack(packed: NDArray[np.uint8], start: int, count: int, width: int) -> NDArray[Any]:
    """`count` numbers of `_pack` from the `start`th on."""
    skipped = start % 8
    groups = (skipped + count + 7) // 8  # of eight numbers, which take `width` bytes
    first_byte = (start - skipped) * width // 8
    piece = packed[first_byte : first_byte + groups * width]
    if 8 % width == 0:
        numbers = _NUMBERS_IN_BYTE[width][piece]
    else:
        columns = np.zeros((groups, width), dtype=np.uint8)
        columns.reshape(-1)[: len(piece)] = piece
        numbers = np.empty((groups, 8), dtype=np.int32)
        for place in range(8):  # each of the eight lies at one place in all groups
            first, shift = divmod(place * width, 8)
            last = (place * width + width - 1) // 8
            value = columns[:, first].astype(np.int32) >> shift
            for byte in range(first + 1, last + 1):
                value |= columns[:, byte].astype(np.int32) << (8 * (byte - first) - shift)
            numbers[:, place] = value & ((1 << width) - 1)
    return numbers.reshape(-1)[skipped : skipped + count]


_NUMBERS_IN_BYTE = {
    width: np.arange(256, dtype=np.uint8)[:, None] >> np.arange(0, 8, width, dtype=np.uint8) & (2**width - 1)
    for width in (1, 2, 4, 8)
}
