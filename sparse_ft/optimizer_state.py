"""The one place that touches an optimizer's state: momenta and scales of weights that are pruned."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def elementwise_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Iterator[tuple[str, Tensor]]:
    """What the optimizer keeps for each single weight, by name: SGD's momentum_buffer, Adam's exp_avg ...

    State of another shape than the parameter (step counts, Adafactor's rows and columns) is not of single weights.
    """
    for name, value in inner_optimizer(optimizer).state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            yield name, value


@torch.no_grad()
def clear_pruned(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, pruned: Tensor) -> None:
    """Zeroes the state of pruned weights: they do not move, and begin anew when they are revived."""
    for _, value in elementwise_state(optimizer, parameter):
        value.masked_fill_(pruned.to(value.device), 0)


@torch.no_grad()
def clear(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Zeroes the state of all weights of a parameter."""
    for _, value in elementwise_state(optimizer, parameter):
        value.zero_()
