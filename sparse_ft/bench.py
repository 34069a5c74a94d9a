"""Training steps and forward passes, dense against sparse, side by side in one process."""

import copy
import resource
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from sparse_ft.conversion import ConversionReport, LayerConversion, to_dense
from sparse_ft.footprint import Footprint, measure_footprint
from sparse_ft.nn import SparseModule, survives_channels_last
from sparse_ft.steps import inference_step, make_optimizer, to_channels_last, training_step
from sparse_ft.tables import format_table
from sparse_ft.tune import interleaved_medians

TURN_S = 0.2  # seconds that a variant runs before it is another's turn


@dataclass(frozen=True)
class Variant:
    """One way to run a model: its form and what it runs on."""

    name: str
    model: nn.Module
    batch: Any
    bf16: bool = False


def variants(model: nn.Module, batch: Any, *, dense: nn.Module | None = None, bf16: bool = False) -> Iterator[Variant]:
    """A converted model and its dense opponents, each a copy of its own.

    Args:
        dense: the opponent; None takes the same weights in dense form.
        bf16: also under autocast to bfloat16: the dense model in the layout that suits it, and the converted one if
            its native kernels take bfloat16.
    """
    dense = to_dense(copy.deepcopy(model)) if dense is None else dense
    yield Variant("sparse", copy.deepcopy(model), batch)
    layers = [module for module in model.modules() if isinstance(module, SparseModule)]
    if bf16 and all(layer.native_reason(torch.empty(0, dtype=torch.bfloat16)) is None for layer in layers):
        yield Variant("sparse bf16", copy.deepcopy(model), batch, bf16=True)
    if not any(isinstance(module, nn.Conv2d) for module in dense.modules()):
        yield Variant("dense", copy.deepcopy(dense), batch)
        if bf16:
            yield Variant("dense bf16", copy.deepcopy(dense), batch, bf16=True)
        return
    yield Variant("dense contiguous", copy.deepcopy(dense), batch)
    if not all(survives_channels_last(module) for module in dense.modules() if isinstance(module, nn.Conv2d)):
        return
    for name, in_bf16 in [("dense channels_last", False), ("dense bf16 channels_last", True)][: 1 + bf16]:
        other: Any = copy.deepcopy(dense)
        yield Variant(name, other.to(memory_format=torch.channels_last), to_channels_last(batch), in_bf16)


@dataclass(frozen=True)
class StepComparison:
    """Median milliseconds of a training step (forward, backward, optimizer), or of a forward pass.

    `dense_ms` is the faster of the dense fp32 model in torch's contiguous and channels-last layouts, each of which
    is in `variants`, as is what ran in bfloat16; `page_faults` counts minor faults per step of each variant.
    """

    dense_ms: float
    sparse_ms: float
    variants: dict[str, float]
    page_faults: dict[str, int]
    threads: int
    rounds: int

    @property
    def speedup(self) -> float:
        """How many times faster the sparse step is, in fp32."""
        return self.dense_ms / self.sparse_ms

    @property
    def dense_bf16_ms(self) -> float | None:
        """The dense model under autocast to bfloat16, where that was measured."""
        return min((ms for name, ms in self.variants.items() if name.startswith("dense bf16")), default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with the speed-up."""
        return {**asdict(self), "speedup": self.speedup}

    def __str__(self) -> str:
        return (
            f"training step: dense {self.dense_ms:.1f} ms, sparse {self.sparse_ms:.1f} ms, "
            f"{self.speedup:.2f} times as fast ({self.threads} threads, medians of {self.rounds} turns)"
        )


def _faults(run: Callable[[], None]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def compare_steps(
    model: nn.Module,
    batch: Any,
    *,
    steps: int = 5,
    optimizer: str = "sgd",
    dense: nn.Module | None = None,
    bf16: bool = False,
) -> StepComparison:
    """Times whole training steps of a converted model against its dense form, taking turns.

    Works on copies: the model, its gradients and statistics are left as they are.

    Args:
        model: a model with sparse layers; on the way it is copied several times.
        batch: what its forward takes: a tensor, a sequence, or a dict of keyword arguments (with labels, the
            model's own loss is used).
        steps: turns of each variant; of short steps a turn is several.
        optimizer: "sgd" (momentum) or "adamw".
        dense: the opponent; None takes the same weights in dense form.
        bf16: time the dense model under autocast to bfloat16, too, and ours where it can.

    Raises:
        ValueError: for an unknown optimizer, or less than one step.
    """
    return _compare(
        {
            v.name: training_step(v.model, v.batch, make_optimizer(v.model, optimizer), bf16=v.bf16)
            for v in variants(model, batch, dense=dense, bf16=bf16)
        },
        steps,
    )


def compare_inference(
    model: nn.Module, batch: Any, *, steps: int = 5, dense: nn.Module | None = None, bf16: bool = False
) -> StepComparison:
    """As `compare_steps`, but forward only: evaluation mode, no gradients."""
    return _compare(
        {
            v.name: inference_step(v.model, v.batch, bf16=v.bf16)
            for v in variants(model, batch, dense=dense, bf16=bf16)
        },
        steps,
    )


def _compare(runs: dict[str, Callable[[], None]], steps: int) -> StepComparison:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    times = interleaved_medians(runs, rounds=steps, turn_s=TURN_S)
    milliseconds = {name: seconds * 1e3 for name, seconds in times.items()}
    return StepComparison(
        dense_ms=min(ms for name, ms in milliseconds.items() if name.startswith("dense") and "bf16" not in name),
        sparse_ms=milliseconds["sparse"],
        variants=milliseconds,
        page_faults={name: _faults(run) for name, run in runs.items()},
        threads=torch.get_num_threads(),
        rounds=steps,
    )


@dataclass(frozen=True)
class Benchmark:
    """A converted model against its dense form: layers, whole training steps, memory. `str()` is three tables.

    Attributes:
        title: model, sparsity and batch, for a person.
        steps: None if no layer runs sparse: the step is then the dense one.
        memory: by variant; empty where it was not measured.
    """

    title: str
    conversion: ConversionReport
    steps: StepComparison | None
    memory: dict[str, Footprint]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        conversion = self.conversion.to_dict()
        return {
            "title": self.title,
            "layers": conversion["layers"],
            "whole_model": conversion["step"],
            "note": conversion["note"],
            "step": self.steps and self.steps.to_dict(),
            "memory": {name: asdict(footprint) for name, footprint in self.memory.items()},
        }

    def __str__(self) -> str:
        layers = self.conversion.layers
        parts = [
            self.title,
            f"{len(self.conversion.converted)} of {len(layers)} layers run sparse (policy {self.conversion.policy})"
            + (f"\n{self.conversion.note}" if self.conversion.note else ""),
            self._layer_table(),
        ]
        if self.steps is None:
            parts.append("no layer runs sparse: the training step is the dense one")
        else:
            parts += [self._step_table(self.steps), str(self.steps)]
        if self.memory:
            before = min(footprint.before for footprint in self.memory.values()) / 2**20
            parts.append(f"peak MB: the whole process; libraries, model and batch alone are {before:.0f} MB or more")
            parts.append(self._state_table())
        return "\n\n".join(parts)

    def _layer_table(self) -> str:
        """Forward and backward of each layer; `share` is its part of the sparse training step."""
        step = self.steps

        def ms(value: float | None) -> str:
            return "" if value is None else f"{value:.2f}"

        def share(value: float | None) -> str:
            return "" if value is None or step is None else f"{value / step.sparse_ms:.1%}"

        rows = [
            [
                layer.name, "x".join(map(str, layer.shape)), f"{layer.sparsity:.1%}",
                "sparse" if layer.converted else "dense", ms(layer.dense_ms), ms(layer.sparse_ms),
                f"{layer.dense_ms / layer.sparse_ms:.2f}" if layer.dense_ms and layer.sparse_ms else "",
                share(_kept_ms(layer)), layer.reason,
            ]
            for layer in self.conversion.layers
        ]  # fmt: skip
        footer = None
        if step is not None and any(layer.dense_ms is not None for layer in self.conversion.layers):
            dense = step.dense_ms - sum(layer.dense_ms or 0.0 for layer in self.conversion.layers)
            sparse = step.sparse_ms - sum(_kept_ms(layer) or 0.0 for layer in self.conversion.layers)
            footer = ["all else in the step", "", "", "", ms(dense), ms(sparse), "", share(sparse), ""]
        headers = ["layer", "weight", "sparsity", "runs", "dense ms", "sparse ms", "ratio", "share", "why"]
        return format_table(headers, rows, footer=footer)

    def _step_table(self, steps: StepComparison) -> str:
        rows = []
        for name, milliseconds in sorted(steps.variants.items(), key=lambda item: -item[1]):
            memory = self.memory.get(name)
            rows.append([
                name, f"{milliseconds:.1f}", f"{milliseconds / steps.sparse_ms:.2f}",
                "" if memory is None else f"{memory.peak / 2**20:.0f}", f"{steps.page_faults[name]:,}",
            ])  # fmt: skip
        return format_table(["training step", "ms", "× sparse", "peak MB", "page faults"], rows)

    def _state_table(self) -> str:
        rows = [
            [name, *(f"{size / 2**20:.1f}" for size in (f.weights, f.gradients, f.optimizer, f.state, f.indices))]
            for name, f in self.memory.items()
        ]
        headers = ["MB held between steps", "weights", "gradients", "optimizer", "together", "sparse indices"]
        return format_table(headers, rows)


def benchmark(
    model: nn.Module,
    batch: Any,
    conversion: ConversionReport,
    *,
    title: str,
    steps: int = 5,
    optimizer: str = "sgd",
    bf16: bool = True,
    memory: bool = True,
    keep_memory: bool = False,
) -> Benchmark:
    """Measures whole steps, and memory, of a model that has been converted.

    Args:
        conversion: what `convert` said of `model`.
        steps, optimizer, bf16: see `compare_steps`.
        memory: measure memory, too, see `sparse_ft.footprint`; a process a variant.
        keep_memory: those processes keep freed memory as `keep_freed_memory` does.
    """
    if not conversion.converted:
        return Benchmark(title, conversion, None, {})
    comparison = compare_steps(model, batch, steps=steps, optimizer=optimizer, bf16=bf16)
    footprints = {}
    if memory:
        for variant in variants(model, batch, bf16=bf16):
            footprints[variant.name] = measure_footprint(variant, optimizer=optimizer, keep_memory=keep_memory)
    return Benchmark(title, conversion, comparison, footprints)


def _kept_ms(layer: LayerConversion) -> float | None:
    return layer.sparse_ms if layer.converted else layer.dense_ms
