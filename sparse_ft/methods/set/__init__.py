"""SET: weights grow at random places."""

import torch
from torch import Tensor

from ..dynamic import DynamicSparsity
from ..fields import field, integer
from ..registry import register
from ..training import Training


@register("SETPruningModifier")
class SET(DynamicSparsity):
    """Sparse evolutionary training: small weights are dropped, and others grow at random, the same on every rank."""

    source = "Mocanu et al. 2018, arXiv 1707.04780"
    seed: int = field(integer(0), 0, doc="Of the random places.")

    def growth(self, training: Training, name: str) -> Tensor:
        place = list(self.targets).index(name)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + training.step) * 10_007 + place)
        weight = self.targets[name].parameter
        return torch.rand(weight.shape, generator=generator).to(weight.device)
