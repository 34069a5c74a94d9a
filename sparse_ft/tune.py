"""Measuring dense against sparse, layer by layer and for the whole model, and remembering the result per machine."""

import copy
import hashlib
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.nn import SparseConv2d, SparseModule, follow_layout, survives_channels_last
from sparse_ft.ops import BATCH_LAST, CHANNELS_LAST, active_isa
from sparse_ft.ops.gradients import to_layout
from sparse_ft.steps import inference_step, mixed_precision, to_channels_last, training_step

_LAYER_BUDGET_S, _STEP_BUDGET_S = 0.4, 6.0  # for the repetitions, unless the verdict is clear before
_MIN_PAIRS, _MAX_PAIRS = 3, 15
_CACHE_VERSION = 7
IMAGE_CHANNELS = 4  # a convolution that reads no more is a network's first


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of forward and backward, dense and sparse, which took turns.

    `spread` is the width of the middle half of the pairs' ratios, sparse to dense, as a natural logarithm: 0.1 says
    that they lie within 10 % of each other.
    """

    dense_ms: float
    sparse_ms: float
    spread: float = 0.0

    @property
    def doubtful(self) -> bool:
        """Whether the ratio varies too much for what it says: by over a tenth and half its distance from a tie."""
        return self.spread > max(0.1, abs(math.log(self.sparse_ms / self.dense_ms)) / 2)


def duel(dense: Mapping[str, Callable[[], object]], sparse: Callable[[], object], budget_s: float) -> Timing:
    """Times the sparse form against the fastest dense one, in turns, so that a noisy machine is noisy to both.

    Pairs are run until the verdict is clear (all agree, two that differ by a factor of 1.65 or more that differ
    less) or the budget is spent. The first round finds the fastest dense form; it is the warm-up as well, and counts
    only where a run takes so long that warming up does not show.
    """
    start = time.perf_counter()
    first = {name: _seconds(run) for name, run in dense.items()}
    sparse_s = _seconds(sparse)
    if time.perf_counter() - start < budget_s / 4:
        first = {name: _seconds(run) for name, run in dense.items()}
        sparse_s = _seconds(sparse)
    rival = min(first, key=first.__getitem__)
    pairs = [(first[rival], sparse_s)]
    start = time.perf_counter()
    while len(pairs) < _MAX_PAIRS and not _clear(pairs):
        if len(pairs) >= _MIN_PAIRS and time.perf_counter() - start > budget_s:
            break
        pairs.append((_seconds(dense[rival]), _seconds(sparse)))
    ratios = sorted(math.log(sparse_s / dense_s) for dense_s, sparse_s in pairs)
    trim = len(ratios) // 4
    dense_s, sparse_s = (statistics.median_low(times) for times in zip(*pairs, strict=True))
    return Timing(dense_s * 1e3, sparse_s * 1e3, ratios[-1 - trim] - ratios[trim])


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _clear(pairs: list[tuple[float, float]]) -> bool:
    logs = [math.log(sparse / dense) for dense, sparse in pairs]
    # One pair proves nothing by itself, however far apart its times: it may have been disturbed.
    evidence = sum(min(abs(x), 0.5) for x in logs)
    return evidence >= 1.0 and (all(x < 0 for x in logs) or all(x > 0 for x in logs))


def interleaved_medians(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, turn_s: float = 0.0
) -> dict[str, float]:
    """Median seconds of each variant over `rounds` turns, after two runs each to warm up.

    Args:
        turn_s: seconds that a turn lasts at least. Where that takes several runs, the first is not counted: it finds
            the caches full of another variant's data, as it would not where it is used.
    """
    for run in variants.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            times[name] += _turn(run, turn_s)
    return {name: statistics.median(values) for name, values in times.items()}


def _turn(run: Callable[[], object], at_least_s: float) -> list[float]:
    times = [_seconds(run)]
    while sum(times) < at_least_s:
        times.append(_seconds(run))
    return times[1:] or times


def _inference(layer: nn.Module, x: Tensor, bf16: bool) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> None:
        with mixed_precision(bf16):
            layer(x).data_ptr()  # of an output that waits for what follows there is none before it is computed

    return run


def _training(layer: nn.Module, x: Tensor, bf16: bool) -> Callable[[], None]:
    x = x.detach().requires_grad_(not _is_image(layer))  # a leaf: backward must end here
    with torch.no_grad(), mixed_precision(bf16):
        grad = torch.randn_like(layer(x))

    def run() -> None:
        with mixed_precision(bf16):
            y = layer(x)
        y.backward(grad)
        x.grad = None
        layer.zero_grad(set_to_none=True)

    return run


def _is_image(layer: nn.Module) -> bool:
    """Whether the layer's input is an image, which has no gradient."""
    return isinstance(layer, nn.Conv2d | SparseConv2d) and layer.in_channels <= IMAGE_CHANNELS


def _trainable_copy(layer: nn.Module) -> nn.Module:
    """A copy all of whose parameters are trained; the gradients of the model's own are not touched."""
    layer = copy.deepcopy(layer)
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    return layer


@torch.enable_grad()
def time_layer(
    layer: SparseModule, shape: torch.Size, *, inside: bool = False, trained: bool = True, bf16: bool = False
) -> Timing:
    """Times a layer and its dense form on random input of `shape`; both as if all their parameters were trained,
    or forward alone.

    A dense convolution is measured in contiguous and in channels-last layout and the faster one counts, whichever
    the model uses now; a sparse one in batch-last layout. `inside` says that a dense form would stand between
    sparse layers and pay for the change of layout. `bf16` times both on bfloat16 input under autocast.
    """
    sparse, dense = _trainable_copy(layer), _trainable_copy(layer.to_dense())
    x = torch.randn(shape, dtype=torch.bfloat16 if bf16 else torch.float32)

    def step(layer: nn.Module, x: Tensor) -> Callable[[], object]:
        return _training(layer, x, bf16) if trained else _inference(layer, x, bf16)

    if isinstance(layer, SparseConv2d):
        as_layout = to_layout
        batch_last = as_layout(x, BATCH_LAST) if x.dim() == 4 else x
        run = step(sparse, batch_last)
        if inside:
            follow_layout(dense)
            # Images come as a data loader makes them.
            given = x if _is_image(layer) else batch_last
            run, rivals = step(sparse, given), {"dense": step(dense, given)}
        else:
            rivals = {"dense": step(dense, x)}
            if x.dim() == 4 and (not trained or survives_channels_last(dense)):  # type: ignore[arg-type]
                other = copy.deepcopy(dense).to(memory_format=torch.channels_last)
                rivals["dense channels_last"] = step(other, as_layout(x, CHANNELS_LAST))
    else:
        run, rivals = step(sparse, x), {"dense": step(dense, x)}
    return duel(rivals, run, _LAYER_BUDGET_S)


@torch.enable_grad()
def time_step(dense: nn.Module, sparse: nn.Module, batch: Any, *, bf16: bool = False) -> Timing:
    """Times forward and backward of a whole model (forward alone where nothing in it is trained).

    Convolutions of the dense model run in channels_last layout, unless torch cannot train one in it; with `bf16` both
    run under autocast to bfloat16. Both models are changed: give copies.
    """
    trained = any(parameter.requires_grad for parameter in dense.parameters())
    convolutions = [module for module in dense.modules() if isinstance(module, nn.Conv2d)]
    last = bool(convolutions) and (not trained or all(map(survives_channels_last, convolutions)))
    if last:
        dense = dense.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(model: nn.Module, batch: Any) -> Callable[[], None]:
        return training_step(model, batch, None, bf16=bf16) if trained else inference_step(model, batch, bf16=bf16)

    return duel({"dense": run(dense, to_channels_last(batch) if last else batch)}, run(sparse, batch), _STEP_BUDGET_S)


def layer_key(sparse: SparseModule, shape: torch.Size, *, inside: bool, trained: bool, bf16: bool = False) -> str:
    """What a layer's timing depends on: its form, its sparsity to one percent, input shape and type, thread count."""
    pattern = sparse.pattern
    parts = [
        type(sparse).__name__, list(pattern.shape), list(pattern.stride), list(pattern.padding),
        list(pattern.dilation), pattern.groups, sparse.bias is not None, round(sparse.sparsity, 2), list(shape),
        inside, trained, bf16, torch.get_num_threads(),
    ]  # fmt: skip
    return json.dumps(parts)


def step_key(model: nn.Module, sparsities: Mapping[str, float], batch: Any, *, bf16: bool = False) -> str:
    """What the timing of a whole model depends on: its structure, what is trained and sparse, precision, the batch.

    Args:
        model: the dense model.
        sparsities: layers that run sparse, with their sparsity.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    sparse = {name: round(sparsity, 2) for name, sparsity in sparsities.items()}
    parts = [repr(model), trained, sparse, _shapes(batch), bf16, torch.get_num_threads()]
    return "step " + hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _shapes(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return [str(batch.dtype), *batch.shape]
    if isinstance(batch, Mapping):
        return {str(key): _shapes(value) for key, value in batch.items()}
    return [_shapes(value) for value in batch] if isinstance(batch, list | tuple) else repr(batch)


def processor() -> str:
    """Name of this machine's processor, empty where the system does not say it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def _code() -> str:
    """Kernels and layers as they lie on the disk: what was measured of other ones says nothing about these."""
    package = Path(__file__).parent
    files = sorted(file for folder in ("ops", "nn") for file in (package / folder).iterdir() if file.is_file())
    return " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


class TimingCache:
    """Timings of this machine in one JSON file, `$SPARSE_FT_CACHE` or ~/.cache/sparse_ft.

    The file's name holds the processor, instruction set, versions and code, so that none of them can mislead. A file
    that cannot be read is as good as none: its timings are measured again.
    """

    def __init__(self, folder: Path | None = None):
        default = os.environ.get("SPARSE_FT_CACHE") or Path(
            os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sparse_ft"
        )
        from sparse_ft import __version__

        machine = [processor(), active_isa(), torch.__version__, __version__, _code(), str(_CACHE_VERSION)]
        name = hashlib.sha256("|".join(machine).encode()).hexdigest()[:16]
        self.path = Path(folder or default) / f"timings-{name}.json"
        self._timings = self._read()
        self._measured: dict[str, Timing] = {}

    def _read(self) -> dict[str, Timing]:
        try:
            stored = {key: Timing(*map(float, times)) for key, times in json.loads(self.path.read_text()).items()}
            return {key: timing for key, timing in stored.items() if not timing.doubtful}
        except (OSError, ValueError, TypeError, AttributeError, ArithmeticError):
            return {}

    def get(self, key: str, measure: Callable[[], Timing]) -> Timing:
        """What is known under `key`, or else what `measure` finds."""
        if key not in self._timings:
            self._timings[key] = self._measured[key] = measure()
        return self._timings[key]

    def save(self) -> None:
        """Writes what was measured, unless it is doubtful: that, and a folder that cannot be written, cost a new
        measurement next time."""
        certain = {key: timing for key, timing in self._measured.items() if not timing.doubtful}
        if not certain:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Another process may have measured other layers since.
            merged = {key: astuple(timing) for key, timing in {**self._read(), **certain}.items()}
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
                json.dump(merged, file)
            os.replace(file.name, self.path)
        except OSError:
            pass
