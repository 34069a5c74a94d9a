"""Random numbers from places: Philox4x32-10 in torch's integers, what the native dropout draws (csrc/dropout.cpp).

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 2**32 - 1


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Four random words from a counter of four words and a key of two, all of 32 bits; the tensors are int64."""
    a, b, c, d = counter
    for i in range(10):
        first, second = (k + i * step & _WORD for k, step in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True))
        left, right = a * 0xD2511F53, c * 0xCD9E8D57  # of 64 bits, whatever the sign
        a, b = (right >> 32 & _WORD) ^ b ^ first, right & _WORD
        c, d = (left >> 32 & _WORD) ^ d ^ second, left & _WORD
    return [a, b, c, d]


def words(count: int, seed: int, device: torch.device | None = None) -> Tensor:
    """The random words of elements 0 to `count` - 1, of four successive ones from one counter."""
    counter = torch.arange(-(-count // 4), device=device)
    zero = torch.zeros_like(counter)
    drawn = philox((counter & _WORD, counter >> 32, zero, zero), (seed & _WORD, seed >> 32 & _WORD))
    return torch.stack(drawn, 1).reshape(-1)[:count]


def least_kept(p: float) -> int:
    """The least word of an element that dropout with probability `p` keeps."""
    return min(round(p * 2**32), _WORD)


def scale(p: float) -> float:
    """What the kept elements are multiplied by."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0
