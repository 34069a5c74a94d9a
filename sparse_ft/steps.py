"""One step of a model on a batch: what timings run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, fused=True),
}


def call(model: nn.Module, batch: Any) -> Any:
    """The model's outputs for a batch: a tensor, a sequence of arguments, or a dict of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch) if isinstance(batch, Tensor) else model(*batch)


def to_channels_last(batch: Any) -> Any:
    """The batch with its images in torch's channels_last layout."""
    if isinstance(batch, Tensor):
        return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch
    if isinstance(batch, Mapping):
        return {key: to_channels_last(value) for key, value in batch.items()}
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return [to_channels_last(value) for value in batch]
    return batch


def loss_of(outputs: Any) -> Tensor:
    """The model's own loss if it gives one, else the mean square of its first output."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if loss is not None:
        return loss
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    return first.float().square().mean()


def make_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """An optimizer for what is trained in `model`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}")
    return OPTIMIZERS[name]([parameter for parameter in model.parameters() if parameter.requires_grad])


@contextmanager
def mixed_precision(bf16: bool) -> Iterator[None]:
    """Runs the block under torch's autocast to bfloat16, or without autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        yield
    # Inside another autocast torch keeps the rounded weights, which a step of training has to make anew.
    torch.clear_autocast_cache()


def training_step(
    model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer | None, *, bf16: bool = False
) -> Callable[[], None]:
    """A function that trains `model` for one step on `batch`.

    Args:
        optimizer: None leaves the weights as they are.
        bf16: run forward under torch's autocast to bfloat16.
    """
    model.train()
    parameters = list(model.parameters())

    def step() -> None:
        with mixed_precision(bf16):
            loss = loss_of(call(model, batch))
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None

    return step


def inference_step(model: nn.Module, batch: Any, *, bf16: bool = False) -> Callable[[], None]:
    """A function that runs `model` forward in evaluation mode, without gradients."""
    model.eval()

    @torch.no_grad()
    def step() -> None:
        with mixed_precision(bf16):
            call(model, batch)

    return step
