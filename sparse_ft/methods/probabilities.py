"""Probabilities of keeping a channel or a weight: what is learned in place of a mask."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8
_EXACT = 1e-12


def project(values: Tensor, budget: float, sizes: Tensor | None = None, low: float = 0.0) -> Tensor:
    """The point nearest to `values` with low <= s <= 1 and sum(sizes * s) <= budget.

    It is clip(values - v, low, 1) for the smallest v >= 0 that meets the budget. The sum is piecewise linear in v and
    falls, so that Newton's steps, held inside a bracket, find v exactly after a few passes over the values.

    Args:
        values: one-dimensional.
        sizes: positive, how often a value counts, in distances as well; all 1 if not given.

    Raises:
        ValueError: even with all values at `low` the budget is exceeded.
    """
    z = values.double()
    weights = torch.ones_like(z) if sizes is None else sizes.double()
    clipped = z.clamp(low, 1.0)
    total = float(weights @ clipped)
    if total <= budget:
        return clipped.to(values.dtype)
    if low * float(weights.sum()) > budget:
        raise ValueError(f"values of at least {low:g} sum to {low * float(weights.sum()):g}, above {budget:g}")
    v, least, most = 0.0, 0.0, float(z.max()) - low
    while abs(total - budget) > _EXACT * max(1.0, budget) and most - least > _EXACT:
        slope = float(weights @ ((clipped > low) & (clipped < 1)).double())
        following = v + (total - budget) / slope if slope else least
        v = following if least < following < most else (least + most) / 2
        clipped = (z - v).clamp(low, 1.0)
        total = float(weights @ clipped)
        if total > budget:
            least = v
        else:
            most = v
    return clipped.to(values.dtype)


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
        flat = project(torch.cat([value.flatten() for value in self.values.values()]), budget, sizes, low)
        parts = flat.split([value.numel() for value in self.values.values()])
        for value, part in zip(self.values.values(), parts, strict=True):
            value.copy_(part.view_as(value))

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
