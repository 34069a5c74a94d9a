"""The policy gradient of a loss with respect to the probabilities of a mask, from losses alone."""

import torch
from torch import Tensor


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A mask: independent Bernoulli numbers, bool."""
    return torch.rand(probabilities.shape, generator=generator) < probabilities


def preconditioned_score(mask: Tensor, probabilities: Tensor) -> Tensor:
    """(m - s) / sqrt(s (1 - s)): the gradient of ln p(m | s), times sqrt(s (1 - s)); 0 where s is 0 or 1.

    Without the factor its variance grows like 1 / s, and training diverges.
    """
    deviation = (probabilities * (1 - probabilities)).sqrt()
    return ((mask.to(probabilities.dtype) - probabilities) / deviation).nan_to_num(0.0, 0.0, 0.0)


def policy_gradient(difference: float, first: Tensor, second: Tensor, probabilities: Tensor) -> Tensor:
    """The variance-reduced estimate of the preconditioned gradient of E[L(m)], of two independent masks.

    sum_i (L_i - mean(L)) h(m_i) / (2 - 1) for two masks: each is the other's baseline.

    Args:
        difference: L(first) - L(second), on the same batch.
    """
    scores = preconditioned_score(first, probabilities) - preconditioned_score(second, probabilities)
    return difference / 2 * scores
