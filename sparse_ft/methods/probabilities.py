"""Probabilities of keeping a channel or a weight: what is learned in place of a mask."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8
_EXACT = 1e-12


def project(values: Tensor, budget: float, sizes: Tensor | None = None, low: float = 0.0) -> Tensor:
    """The point nearest to `values` with low <= s <= 1 and sum(sizes * s) <= budget: clip(values - v, low, 1) for the
    smallest v >= 0 that meets the budget.

    Args:
        values: one-dimensional.
        sizes: positive, how often a value counts, in distances as well; all 1 if not given.

    Raises:
        ValueError: even with all values at `low` the budget is exceeded.
    """
    projected = values.clone()
    _move(_pieces([projected], sizes), budget, low)
    return projected


# Values, and how often they count. Few enough to stay in cache, in double precision, between two operations.
_Piece = tuple[Tensor, Tensor | None]
_PIECE = 1 << 15
_SAMPLE = 1 << 14  # values enough to guess the shift of many more


def _pieces(tensors: Sequence[Tensor], sizes: Tensor | None = None) -> list[_Piece]:
    """Views of the tensors, one after the other; `sizes` is of the first one."""
    pieces: list[_Piece] = []
    for tensor in tensors:
        flat = tensor.as_strided((tensor.numel(),), (1,))  # as it lies in memory: channels_last, for one
        for start in range(0, len(flat), _PIECE):
            counts = None if sizes is None else sizes[start : start + _PIECE].double()
            pieces.append((flat[start : start + _PIECE], counts))
    return pieces


def _move(pieces: list[_Piece], budget: float, low: float) -> None:
    """Projects in place."""
    shift = _shift(pieces, budget, low)
    for values, _ in pieces:
        values.copy_((values.double() - shift).clamp_(low, 1.0))


def _shift(pieces: list[_Piece], budget: float, low: float) -> float:
    """The v that the projection subtracts, exactly.

    The sum that is left is piecewise linear in v and falls, so that Newton's steps, held inside a bracket, find v.
    Each is a pass over the values; from a v that is right for a sample of many values a few are left.
    """
    count = sum(len(values) for values, _ in pieces)
    total, slope = _sum(pieces, 0.0, low)
    if total <= budget:
        return 0.0
    least_sum = low * sum(len(values) if sizes is None else float(sizes.sum()) for values, sizes in pieces)
    if least_sum > budget:
        raise ValueError(f"values of at least {low:g} sum to {least_sum:g}, above {budget:g}")
    least, most = 0.0, max(float(values.max()) for values, _ in pieces) - low
    every = count // _SAMPLE
    if every > 1 and all(sizes is None for _, sizes in pieces):
        sample = torch.cat([values[::every] for values, _ in pieces])
        following = _shift([(sample, None)], budget * len(sample) / count, low)
    else:
        following = (total - budget) / slope if slope else least
    v = 0.0
    while abs(total - budget) > _EXACT * max(1.0, budget) and most - least > _EXACT:
        v = following if least < following < most else (least + most) / 2
        total, slope = _sum(pieces, v, low)
        if total > budget:
            least = v
        else:
            most = v
        following = v + (total - budget) / slope if slope else least
    return v


def _sum(pieces: list[_Piece], shift: float, low: float) -> tuple[float, float]:
    """Of clip(values - shift, low, 1), each as often as it counts, and how fast it falls with the shift."""
    total = slope = 0.0
    for values, sizes in pieces:
        shifted = values.double() - shift
        clipped = shifted.clamp(low, 1.0)
        inside = (shifted > low) & (shifted < 1.0)
        if sizes is None:
            total += float(clipped.sum())
            slope += int(inside.count_nonzero())
        else:
            total += float(sizes @ clipped)
            slope += float(sizes @ inside.double())
    return total, slope


def kept_share(progress: float, sparsity: float, begin: float, end: float) -> float:
    """The part of everything that the budget is: all until `begin`, then down a cubic curve to 1 - sparsity at `end`.

    Args:
        progress, begin, end: of the time of the search, in [0, 1].
    """
    x = 1.0 if progress >= end else max(progress - begin, 0.0) / (end - begin)
    return 1 - sparsity * (1 - (1 - x) ** 3)


def generator(seed: int, step: int, draw: int) -> torch.Generator:
    """Random numbers that are the same on every process and after every resumption."""
    mixed = (seed * 0x9E3779B1 + step * 0x85EBCA77 + draw * 0xC2B2AE3D) % 2**32
    return torch.Generator().manual_seed(mixed)


class Learned:
    """Tensors of probabilities under one budget, that Adam moves.

    Attributes:
        values: in [0, 1], by name.
    """

    def __init__(self, values: Mapping[str, Tensor]):
        self.values = dict(values)
        self._first = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self._second = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], rate: float) -> None:
        """One step of Adam (Kingma & Ba 2015), without the projection."""
        self._steps += 1
        small, large = (1 - beta**self._steps for beta in BETAS)
        for name, gradient in gradients.items():
            first = self._first[name].lerp_(gradient, 1 - BETAS[0])
            second = self._second[name].mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            scale = (second / large).sqrt_().add_(EPSILON)
            self.values[name].addcdiv_(first, scale, value=-rate / small)

    @torch.no_grad()
    def project(self, budget: float, sizes: Tensor | None = None, low: float = 0.0) -> None:
        """Brings the values, all together, back to their bounds and budget."""
        _move(_pieces(list(self.values.values()), sizes), budget, low)

    def state_dict(self) -> dict[str, object]:
        return {"values": self.values, "first": self._first, "second": self._second, "steps": self._steps}

    @classmethod
    def of_state(cls, state: Mapping) -> "Learned":
        """What gave this `state_dict`."""
        made = cls({name: value.clone() for name, value in state["values"].items()})
        made._first = {name: value.clone() for name, value in state["first"].items()}
        made._second = {name: value.clone() for name, value in state["second"].items()}
        made._steps = int(state["steps"])
        return made


def cosine(rate: float, progress: float) -> float:
    """A rate that falls to nothing on half a cosine."""
    return rate * (1 + math.cos(math.pi * progress)) / 2


def clip(gradients: Mapping[str, Tensor], most: float) -> dict[str, Tensor]:
    """The gradients, shortened to a joint norm of at most `most`."""
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    scale = min(1.0, most / norm) if norm > 0 else 1.0
    return {name: gradient * scale for name, gradient in gradients.items()}
