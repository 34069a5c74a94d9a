"""The units of a model, found by one forward pass and tried out by two more."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.masks.targets import unwrap
from sparse_ft.randomness import preserved_random_state
from sparse_ft.steps import call

from .subnetwork import SubNetwork
from .tracing import tensors_of, trace_channels
from .units import ChannelError, Channels


def analyze_channels(model: nn.Module, inputs: Any) -> Channels:
    """Finds which channels of a model can only be left out together, and makes sure that it runs without some.

    The model is left as it is; it runs in evaluation mode, without gradients.

    Args:
        model: also inside DistributedDataParallel; convolutions, linear layers and batch norms are taken apart.
        inputs: an input batch: a tensor, a sequence of arguments, or a dict of keyword arguments.

    Raises:
        ChannelError: the model cannot run with a part of its channels, for instance because its code counts on their
            number, or it computes something else then.
    """
    model = unwrap(model)
    # Autocast computes with copies of the weights, which belong to no layer.
    whole_precision = torch.autocast("cpu", enabled=False)
    with torch.no_grad(), preserved_random_state(), evaluating(model), whole_precision:
        channels = trace_channels(model, inputs)
        if channels.count:
            _try_out(model, channels, inputs)
    return channels


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in evaluation mode."""
    was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was.items():
            module.training = training


def _try_out(model: nn.Module, channels: Channels, inputs: Any) -> None:
    """Compares the model without every third unit with the model in which these are zero."""
    everything = torch.arange(channels.count)
    kept = channels.with_floor(everything % 3 != 1, 1, torch.zeros(channels.count))
    with _masked(model, channels, kept):
        expected = tensors_of(call(model, inputs))
    try:
        with SubNetwork(model, channels, kept).active():
            found = tensors_of(call(model, inputs))
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ChannelError(
            f"{type(model).__name__} does not run with a part of its channels, whose number its code counts on "
            f"({reason}): its filters can be masked, but not left out"
        ) from error
    if not same_outputs(found, expected):
        raise ChannelError(
            f"{type(model).__name__} computes something else without a part of its channels than with these at zero: "
            "its filters can be masked, but not left out"
        )


@contextmanager
def _masked(model: nn.Module, channels: Channels, kept: Tensor) -> Iterator[None]:
    """Inside, the units that are not kept make nothing but zeros."""
    modules = dict(model.named_modules())
    before = []
    try:
        for place in channels.places:
            if place.kind != "statistic":
                store: Any = modules[place.layer]._parameters
                tensor = store[place.key]
                before.append((store, place.key, tensor))
                stays = place.made_by(kept).view(-1, *[1] * (tensor.dim() - 1))
                store[place.key] = torch.where(stays, tensor, 0.0)
        yield
    finally:
        for store, key, tensor in before:
            store[key] = tensor


def same_outputs(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two passes gave the same, but for the order in which numbers were added."""
    for ours, theirs in zip(found, expected, strict=True):
        scale = float(theirs.abs().max()) if theirs.is_floating_point() and theirs.numel() else 1.0
        if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * max(scale, 1e-6)):
            return False
    return True
