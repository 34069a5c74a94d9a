"""One step of a model on a batch: what timings run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-5),
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


def training_step(model: nn.Module, batch: Any, optimizer: str | None = "sgd") -> Callable[[], None]:
    """A function that trains `model` for one step on `batch`; with optimizer None it leaves the weights alone.

    Raises:
        ValueError: for an unknown optimizer.
    """
    update = None
    if optimizer is not None:
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {optimizer!r}")
        update = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    model.train()

    def step() -> None:
        loss_of(call(model, batch)).backward()
        if update is not None:
            update.step()
        model.zero_grad(set_to_none=True)

    return step


def inference_step(model: nn.Module, batch: Any) -> Callable[[], None]:
    """A function that runs `model` forward in evaluation mode, without gradients."""
    model.eval()

    @torch.no_grad()
    def step() -> None:
        call(model, batch)

    return step
