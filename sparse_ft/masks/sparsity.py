"""How sparse a model is, layer by layer."""

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_ft.atomic import replacing
from sparse_ft.nn import SparseModule
from sparse_ft.tables import format_table

from .names import weight_name
from .targets import dense_shape, prunable_layers, typed_layers

_HEADERS = ["layer", "kind", "shape", "nonzeros", "weights", "sparsity", "note"]


@dataclass(frozen=True)
class LayerSparsity:
    """One layer: `nnz` of `numel` weights are nonzero; `note` says why pruning leaves it out, or is empty."""

    name: str
    kind: str
    shape: tuple[int, ...]
    numel: int
    nnz: int
    note: str = ""

    @property
    def sparsity(self) -> float:
        return 1 - self.nnz / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class SparsityReport:
    """Sparsity of the layers of a prunable type: Linear, Conv1d to Conv3d, transformers' Conv1D, SparseModule.

    Biases, norms and embeddings are not counted; a weight that several layers share is counted once.
    `str()` is a table.
    """

    layers: list[LayerSparsity] = field(default_factory=list)

    @property
    def numel(self) -> int:
        return sum(layer.numel for layer in self.layers)

    @property
    def nnz(self) -> int:
        return sum(layer.nnz for layer in self.layers)

    @property
    def overall(self) -> float:
        """Zeros / weights over all layers of the report, those left dense included."""
        return _ratio(self.layers)

    @property
    def overall_pruned(self) -> float:
        """Zeros / weights over the layers that have zeros; 0 if none has."""
        return _ratio([layer for layer in self.layers if layer.nnz < layer.numel])

    def __str__(self) -> str:
        return format_table(_HEADERS, list(map(_cells, self.layers)), footer=self._totals())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: totals, and the layers in module order."""
        return {
            "sparsity": self.overall,
            "sparsity_of_pruned_layers": self.overall_pruned,
            "nnz": self.nnz,
            "numel": self.numel,
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "shape": list(layer.shape),
                    "nnz": layer.nnz,
                    "numel": layer.numel,
                    "sparsity": layer.sparsity,
                    "note": layer.note,
                }
                for layer in self.layers
            ],
        }

    def to_html(self) -> str:
        """A table as an HTML fragment: no style sheet, script or image is needed."""

        # Names come from checkpoints of strangers.
        def row(cells: list[str], tag: str = "td") -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "\n".join(row(_cells(layer)) for layer in self.layers)
        return (
            f'<table class="sparsity">\n<thead>{row(_HEADERS, "th")}</thead>\n'
            f"<tbody>\n{body}\n</tbody>\n<tfoot>{row(self._totals(), 'th')}</tfoot>\n</table>"
        )

    def plot(self, path: str | Path) -> None:
        """Write a horizontal bar per layer, its sparsity in percent, to a PNG, SVG or PDF file by its suffix."""
        # A figure of its own leaves pyplot and the backend that the user has chosen alone.
        from matplotlib.figure import Figure

        names = [layer.name or "(model)" for layer in self.layers]
        figure = Figure(figsize=(8, 1.2 + 0.22 * len(names)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(names)), [100 * layer.sparsity for layer in self.layers], color="#3b6ea5")
        axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(0, 100)
        axes.set_xlabel("zero weights, %")
        axes.set_title(f"sparsity {self.overall:.2%}: {self.nnz:,} of {self.numel:,} weights are nonzero", fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150)

    def _totals(self) -> list[str]:
        note = f"{self.overall_pruned:.2%} in the layers with zeros" if self.nnz < self.numel else ""
        return ["total", "", "", f"{self.nnz:,}", f"{self.numel:,}", f"{self.overall:.2%}", note]


def sparsity(model: nn.Module) -> SparsityReport:
    """Count the zeros of a model, layer by layer.

    In a native sparse layer the positions outside its pattern count as zeros; so does an exact 0.0 inside it.
    """
    return report(model, prunable_layers(model).skipped)


def report(model: nn.Module, skipped: Mapping[str, str]) -> SparsityReport:
    """Sparsity of a model, with the reasons of the layers that pruning left out as notes."""
    layers = []
    counted: set[int] = set()
    for name, layer in typed_layers(model).items():
        weight = layer._parameters.get("weight")
        if weight is None:
            weight = getattr(layer, "weight", None)  # parametrised: computed from other parameters
        if not isinstance(weight, Tensor) or isinstance(weight, nn.UninitializedParameter) or id(weight) in counted:
            continue
        counted.add(id(weight))
        shape = dense_shape(layer)
        numel, nnz = shape.numel(), int(torch.count_nonzero(weight.detach()))
        note = skipped.get(name, "")
        if note and nnz == numel:
            note += " (left dense)"
        layers.append(LayerSparsity(name, type(layer).__name__, tuple(shape), numel, nnz, note))
    return SparsityReport(layers)


def mask_state(model: nn.Module) -> dict[str, Tensor]:
    """Masks of a sparse model by the name of the weight (`layer1.0.conv1.weight`): True where it may be nonzero.

    A native sparse layer gives its pattern, which may hold zeros; a dense layer of a prunable type gives its
    nonzeros, if it has at least one zero. A dense weight that is all zeros is left out: that is how a new output
    layer or adapter starts, not a pruned one.
    """
    masks: dict[str, Tensor] = {}
    for name, layer in typed_layers(model).items():
        if isinstance(layer, SparseModule):
            masks[weight_name(name)] = cast(Any, layer).mask()
            continue
        weight = layer._parameters.get("weight")
        if weight is None or isinstance(weight, nn.UninitializedParameter) or not weight.is_floating_point():
            continue
        mask = weight.detach() != 0
        if mask.any() and not mask.all():
            masks[weight_name(name)] = mask
    return masks


def _ratio(layers: list[LayerSparsity]) -> float:
    numel = sum(layer.numel for layer in layers)
    return 1 - sum(layer.nnz for layer in layers) / numel if numel else 0.0


def _cells(layer: LayerSparsity) -> list[str]:
    shape = "x".join(map(str, layer.shape))
    return [layer.name, layer.kind, shape, f"{layer.nnz:,}", f"{layer.numel:,}", f"{layer.sparsity:.2%}", layer.note]
