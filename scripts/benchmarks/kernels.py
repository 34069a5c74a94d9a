"""Single layers: the three products as a share of the core's peak, and the published packages beside ours."""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sparse_ft
from sparse_ft import ops
from sparse_ft.tune import interleaved_medians

from .case import Case, Settings
from .machine import fma_peak, roofs

ROUNDS = 9


@dataclass(frozen=True)
class Shape:
    """A layer of a network; `size` is the side of its input image, or the number of tokens."""

    inputs: int
    outputs: int
    size: int
    kernel: int = 0
    stride: int = 1
    batch: int = 32

    def __str__(self) -> str:
        if not self.kernel:
            return f"linear {self.inputs}→{self.outputs}, {self.size} tokens"
        stride = f" /{self.stride}" if self.stride > 1 else ""
        return f"conv {self.inputs}→{self.outputs} {self.kernel}×{self.kernel}{stride}, {self.size}²"

    def make(self, sparsity: float) -> tuple[nn.Module, Tensor]:
        """A dense layer whose weight has so many zeros, at random places, and an input."""
        if self.kernel:
            layer: nn.Module = nn.Conv2d(
                self.inputs, self.outputs, self.kernel, self.stride, self.kernel // 2, bias=False
            )
            x = torch.randn(self.batch, self.inputs, self.size, self.size)
        else:
            layer, x = nn.Linear(self.inputs, self.outputs), torch.randn(self.size, self.inputs)
        with torch.no_grad():
            layer.weight.masked_fill_(torch.rand(layer.weight.shape) < sparsity, 0.0)
        return layer, x


LINEAR = Shape(768, 3072, 2048)
RESNET18 = [
    Shape(64, 64, 56, 3),
    Shape(64, 128, 56, 3, 2),
    Shape(64, 128, 56, 1, 2),
    Shape(128, 128, 28, 3),
    Shape(128, 256, 28, 3, 2),
    Shape(128, 256, 28, 1, 2),
    Shape(256, 256, 14, 3),
    Shape(256, 512, 14, 3, 2),
    Shape(256, 512, 14, 1, 2),
    Shape(512, 512, 7, 3),
]


def cases() -> list[Case]:
    found = [Case("roofs", lambda s: roofs())]
    for sparsity in (0.80, 0.90, 0.95):
        found.append(Case(f"linear-{sparsity * 100:.0f}", lambda s, p=sparsity: measure([LINEAR], p, s)))
    for sparsity in (0.90, 0.95):
        found.append(Case(f"conv-{sparsity * 100:.0f}", lambda s, p=sparsity: measure(RESNET18, p, s)))
    return [*found, Case("pattern", measure_pattern)]


def measure(shapes: list[Shape], sparsity: float, settings: Settings) -> dict:
    """Products and rivals on one core and on all that are used."""
    try:
        rows = []
        for threads in sorted({1, settings.threads}):
            torch.set_num_threads(threads)
            for shape in shapes:
                rows.append({"layer": str(shape), "kernel": shape.kernel, "threads": threads,
                             **measure_layer(shape, sparsity)})  # fmt: skip
    finally:
        torch.set_num_threads(settings.threads)
    return {"sparsity": sparsity, "rows": rows}


def measure_layer(shape: Shape, sparsity: float) -> dict:
    torch.manual_seed(0)
    dense, x = shape.make(sparsity)
    kind = sparse_ft.nn.SparseConv2d if shape.kernel else sparse_ft.nn.SparseLinear
    sparse = kind.from_dense(dense)
    ours = torch.ops.sparse_ft.to_layout(x, ops.BATCH_LAST) if shape.kernel else x
    peak = fma_peak()
    runs = products(sparse, ours)
    flops = 2e-9 * sparse.nnz * (sparse(ours).numel() / shape.outputs)
    medians = interleaved_medians(runs, rounds=ROUNDS)
    peak = max(peak, fma_peak())  # measured before and after: a disturbed core is no roof
    return {
        "peak": peak,
        "gflops": {name: flops / seconds for name, seconds in medians.items()},
        "rivals": rivals(shape, dense, sparse, x, ours),
    }


def products(layer: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """Forward, and each gradient alone."""
    with torch.no_grad():
        grad = torch.randn_like(layer(x))
    layer = copy.deepcopy(layer).requires_grad_(False)
    leaf = x.detach().requires_grad_(True)
    to_input = layer(leaf)
    layer.weight.requires_grad_(True)
    to_weight = layer(x.detach())
    return {
        "forward": forward_only(layer, x),
        "input gradient": lambda: torch.autograd.grad(to_input, leaf, grad, retain_graph=True),
        "weight gradient": lambda: torch.autograd.grad(to_weight, layer.weight, grad, retain_graph=True),
    }


def forward_only(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return torch.no_grad()(lambda: layer(x))


def rivals(shape: Shape, dense: nn.Module, sparse: nn.Module, x: Tensor, ours: Tensor) -> dict[str, dict[str, float]]:
    """Milliseconds of each package's own layer, taking turns: "forward", and "step" (forward and backward)."""
    layers: dict[str, tuple[nn.Module, Tensor]] = {"sparse_ft": (sparse, ours), "torch dense": (dense, x)}
    if shape.kernel:
        last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
        layers["torch dense channels_last"] = (last, x.contiguous(memory_format=torch.channels_last))
    for name, load in (("sparseprop", _sparseprop), ("sparselab", _sparselab)):
        try:
            layers |= {label: (layer, x) for label, layer in load(shape, dense).items()}
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    forward = {name: forward_only(*pair) for name, pair in layers.items()}
    if not shape.kernel:
        csr, xt = dense.weight.detach().to_sparse_csr(), x.t().contiguous()
        forward["torch CSR"] = lambda: csr @ xt  # no usable gradient for a fixed pattern on CPUs
    times: dict[str, dict[str, float]] = {name: {} for name in forward}
    steps = {name: step(*pair) for name, pair in layers.items()}
    for what, runs in (("forward", forward), ("step", steps)):
        for name, seconds in interleaved_medians(runs, rounds=ROUNDS).items():
            times[name][what] = seconds * 1e3
    return times


def step(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    x = x.detach().requires_grad_(True)
    with torch.no_grad():
        grad = torch.randn_like(layer(x))

    def run() -> None:
        layer(x).backward(grad)
        x.grad = None
        layer.zero_grad(set_to_none=True)

    return run


def _sparseprop(shape: Shape, dense: nn.Module) -> dict[str, nn.Module]:
    from sparseprop.modules import SparseConv2d, SparseLinear

    if not shape.kernel:
        return {"sparseprop": SparseLinear.from_dense(dense)}
    # It has two vectorisations, and its own tuning takes the faster one.
    return {
        f"sparseprop ({name})": SparseConv2d.from_dense(dense, vectorizing_over_on=over)
        for name, over in (("batch", False), ("width", True))
    }


def _sparselab(shape: Shape, dense: nn.Module) -> dict[str, nn.Module]:
    if shape.kernel:
        return {}  # it has no convolution
    import sparselab

    sparsity = 1.0 - torch.count_nonzero(dense.weight).item() / dense.weight.numel()
    return {"sparselab": sparselab.SparseLinear(shape.inputs, shape.outputs, sparsity=sparsity)}


def measure_pattern(settings: Settings) -> dict:
    """Building the pattern of a large weight, in passes of torch over it."""
    weight = torch.randn(2500, 4000)
    weight.masked_fill_(torch.rand(weight.shape) < 0.9, 0.0)
    medians = interleaved_medians(
        {"build": lambda: ops.SparsePattern.build(weight), "read": lambda: weight.abs().sum()}, rounds=ROUNDS
    )
    return {name: seconds * 1e3 for name, seconds in medians.items()}


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
