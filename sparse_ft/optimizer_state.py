"""The one place that touches an optimizer's state: momenta and scales of weights that are pruned."""

from collections.abc import Callable, Iterator

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


@torch.no_grad()
def exchange(
    optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter, carry: Callable[[Tensor], Tensor]
) -> None:
    """Puts a parameter into the place of another, with its state.

    Args:
        carry: gives of a tensor of the old parameter's shape the one of the new parameter's.
    """
    inner = inner_optimizer(optimizer)
    for group in inner.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = inner.state.pop(old, None)
    if state is not None:
        inner.state[new] = {
            name: carry(value) if isinstance(value, Tensor) and value.shape == old.shape else value
            for name, value in state.items()
        }
