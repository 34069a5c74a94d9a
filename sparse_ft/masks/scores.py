"""How much each weight matters: the lowest scores are pruned first."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .names import weight_name

Score = str | Callable[[str, nn.Module], Tensor]


def magnitude(name: str, module: nn.Module) -> Tensor:
    """Absolute values of the weight (Han et al. 2015, arXiv 1506.02626)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().abs()


SCORES: dict[str, Callable[[str, nn.Module], Tensor]] = {"magnitude": magnitude}


def compute_score(score: Score, name: str, module: nn.Module) -> Tensor:
    """Score of every weight of a layer, float32 or float64, of the weight's shape.

    Args:
        score: A key of `SCORES` or a callable `(layer name, module) -> Tensor` of the weight's shape.

    Raises:
        ValueError: An unknown name; a score of another shape or with NaN in it.
    """
    if isinstance(score, str):
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}; choose from {', '.join(SCORES)} or pass a callable")
        score = SCORES[score]
    weight = module.weight
    assert isinstance(weight, Tensor)
    values = score(name, module)
    if not isinstance(values, Tensor) or values.shape != weight.shape:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"score of layer {name!r} must be a tensor of shape {tuple(weight.shape)}, not {found}")
    values = values.detach()
    if values.dtype != torch.float64:
        values = values.float()
    if values.isnan().any():
        raise ValueError(f"score of {weight_name(name)!r} has NaN in it: the weight or its gradient diverged")
    return values
