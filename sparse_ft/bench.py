"""Whole training steps, dense against sparse, side by side in one process."""

import copy
import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sparse_ft.conversion import to_dense
from sparse_ft.steps import to_channels_last, training_step
from sparse_ft.tune import interleaved_medians


@dataclass(frozen=True)
class StepComparison:
    """Median milliseconds of a training step: forward, backward, optimizer.

    `dense_ms` is the faster of the dense model in torch's contiguous and channels-last layouts, each of which is in
    `variants`; `page_faults` counts minor faults per step of each variant.
    """

    dense_ms: float
    sparse_ms: float
    variants: dict[str, float]
    page_faults: dict[str, int]
    threads: int
    rounds: int

    @property
    def speedup(self) -> float:
        """How many times faster the sparse step is."""
        return self.dense_ms / self.sparse_ms

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the speed-up."""
        return {**asdict(self), "speedup": self.speedup}

    def __str__(self) -> str:
        return (
            f"training step: dense {self.dense_ms:.1f} ms, sparse {self.sparse_ms:.1f} ms, "
            f"{self.speedup:.2f} times as fast ({self.threads} threads, medians of {self.rounds})"
        )


def _faults(run: Callable[[], None]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def compare_steps(
    model: nn.Module, batch: Any, *, steps: int = 5, optimizer: str = "sgd", dense: nn.Module | None = None
) -> StepComparison:
    """Times whole training steps of a converted model against its dense form, taking turns.

    Works on copies: the model, its gradients and statistics are left as they are.

    Args:
        model: a model with sparse layers; on the way it is copied twice.
        batch: what its forward takes: a tensor, a sequence, or a dict of keyword arguments (with labels, the
            model's own loss is used).
        steps: timed steps of each variant.
        optimizer: "sgd" (momentum) or "adamw".
        dense: the opponent; None takes the same weights in dense form.

    Raises:
        ValueError: for an unknown optimizer, or less than one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    sparse = copy.deepcopy(model)
    dense = to_dense(copy.deepcopy(model)) if dense is None else copy.deepcopy(dense)
    images = any(isinstance(module, nn.Conv2d) for module in dense.modules())
    variants = {
        "sparse": training_step(sparse, batch, optimizer),
        "dense contiguous": training_step(dense, batch, optimizer),
    }
    if images:
        other = copy.deepcopy(dense).to(memory_format=torch.channels_last)
        variants["dense channels_last"] = training_step(other, to_channels_last(batch), optimizer)
    medians = interleaved_medians(variants, rounds=steps)
    milliseconds = {name: seconds * 1e3 for name, seconds in medians.items()}
    return StepComparison(
        dense_ms=min(ms for name, ms in milliseconds.items() if name != "sparse"),
        sparse_ms=milliseconds["sparse"],
        variants=milliseconds,
        page_faults={name: _faults(run) for name, run in variants.items()},
        threads=torch.get_num_threads(),
        rounds=steps,
    )
