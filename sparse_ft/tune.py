"""Measuring a layer's dense and sparse forms on its real input shape, and remembering the result per machine."""

import copy
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_ft.nn import SparseConv2d, SparseModule, layout_conv
from sparse_ft.ops import BATCH_LAST, CHANNELS_LAST, active_isa

_BUDGET_S = 0.4  # for the repetitions of one layer, all its forms together
_CACHE_VERSION = 2


@dataclass(frozen=True)
class LayerTiming:
    """Median milliseconds of forward and backward (input and weight gradient) of one layer."""

    dense_ms: float
    sparse_ms: float


def interleaved_medians(
    variants: Mapping[str, Callable[[], object]], *, rounds: int | None = None
) -> dict[str, float]:
    """Median seconds of each variant; the variants take turns, so that a noisy machine is noisy to all alike.

    Args:
        rounds: turns after one warm-up each; None chooses 5 to 15 from the time that the warm-up took.
    """
    warm = 0.0
    for run in variants.values():
        run()
        start = time.perf_counter()
        run()
        warm += time.perf_counter() - start
    if rounds is None:
        rounds = int(min(15, max(5, _BUDGET_S / max(warm, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def _step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    x = x.detach().requires_grad_(True)  # a leaf: backward must end here
    with torch.no_grad():
        grad = torch.randn_like(layer(x))

    def run() -> None:
        layer(x).backward(grad)
        x.grad = None
        layer.zero_grad(set_to_none=True)

    return run


def _trainable_copy(layer: nn.Module) -> nn.Module:
    """A copy all of whose parameters are trained; the gradients of the model's own are not touched."""
    layer = copy.deepcopy(layer)
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    return layer


@torch.enable_grad()
def time_layer(layer: SparseModule, shape: torch.Size, *, inside: bool = False) -> LayerTiming:
    """Times a layer and its dense form on random input of `shape`; both as if all their parameters were trained.

    A dense convolution is measured in contiguous and in channels-last layout and the faster one counts, whichever
    the model uses now; a sparse one in batch-last layout. `inside` says that a dense form would stand between
    sparse layers and pay for the change of layout.
    """
    sparse, dense = _trainable_copy(layer), _trainable_copy(layer.to_dense())
    x = torch.randn(shape, dtype=torch.float32)
    if isinstance(layer, SparseConv2d):
        as_layout = torch.ops.sparse_ft.to_layout
        batch_last = as_layout(x, BATCH_LAST) if x.dim() == 4 else x
        variants = {"sparse": _step(sparse, batch_last)}
        if inside:
            layout_conv(dense)
            variants["dense"] = _step(dense, batch_last)
        else:
            variants["dense"] = _step(dense, x)
            if x.dim() == 4:
                other = copy.deepcopy(dense).to(memory_format=torch.channels_last)
                variants["dense channels_last"] = _step(other, as_layout(x, CHANNELS_LAST))
    else:
        variants = {"sparse": _step(sparse, x), "dense": _step(dense, x)}
    medians = interleaved_medians(variants)
    sparse_s = medians.pop("sparse")
    return LayerTiming(dense_ms=min(medians.values()) * 1e3, sparse_ms=sparse_s * 1e3)


def timing_key(sparse: SparseModule, shape: torch.Size, inside: bool) -> str:
    """What a timing depends on: the layer's form, its sparsity to one percent, input shape and thread count."""
    pattern = sparse.pattern
    parts = [
        type(sparse).__name__, list(pattern.shape), list(pattern.stride), list(pattern.padding),
        list(pattern.dilation), pattern.groups, sparse.bias is not None, round(sparse.sparsity, 2), list(shape),
        inside, torch.get_num_threads(),
    ]  # fmt: skip
    return json.dumps(parts)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


class TimingCache:
    """Timings of this machine in one JSON file, `$SPARSE_FT_CACHE` or ~/.cache/sparse_ft.

    The file's name holds the processor, instruction set and versions, so that none of them can mislead. A file
    that cannot be read is as good as none: its timings are measured again.
    """

    def __init__(self, folder: Path | None = None):
        default = os.environ.get("SPARSE_FT_CACHE") or Path(
            os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sparse_ft"
        )
        from sparse_ft import __version__

        machine = [_processor(), active_isa(), torch.__version__, __version__, str(_CACHE_VERSION)]
        name = hashlib.sha256("|".join(machine).encode()).hexdigest()[:16]
        self.path = Path(folder or default) / f"timings-{name}.json"
        self._timings = self._read()
        self._changed = False

    def _read(self) -> dict[str, LayerTiming]:
        try:
            stored = json.loads(self.path.read_text())
            return {key: LayerTiming(float(dense), float(sparse)) for key, (dense, sparse) in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def get(self, sparse: SparseModule, shape: torch.Size, *, inside: bool) -> LayerTiming:
        """What `time_layer` says of these arguments, now or earlier."""
        key = timing_key(sparse, shape, inside)
        if key not in self._timings:
            self._timings[key] = time_layer(sparse, shape, inside=inside)
            self._changed = True
        return self._timings[key]

    def save(self) -> None:
        """Writes what was measured; a folder that cannot be written costs a new measurement next time."""
        if not self._changed:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Another process may have measured other layers since.
            merged = {key: (t.dense_ms, t.sparse_ms) for key, t in {**self._read(), **self._timings}.items()}
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
                json.dump(merged, file)
            os.replace(file.name, self.path)
            self._changed = False
        except OSError:
            pass
