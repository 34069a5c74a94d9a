"""Figures of a report, as SVG that takes its text colour from the page around it."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparse_ft.conversion import LayerConversion
from sparse_ft.masks import LayerSparsity

MAX_BARS = 40
MAX_NAMES = 12  # in a scatter plot
WIDTH = 4.2  # inches: a phone shows that unscaled, so that the text stays readable there
DENSE, SPARSE, THIRD = "#c2703d", "#3b7dbf", "#5a9e6f"
# matplotlib writes colours as numbers; this one stands for the page's text colour and is replaced at the end.
_INK = "#010203"
# Keys of a Trainer's log that are no metric.
_NO_METRIC = re.compile(r"(^|_)(loss|runtime|samples_per_second|steps_per_second|epoch|step|flops?|memory)$")


def loss_curves(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Training and evaluation loss of a Trainer's log; None if it has none."""
    curves = {
        "training": _series(history, "loss"),
        "evaluation": _series(history, "eval_loss"),
    }
    return _curves({name: curve for name, curve in curves.items() if curve}, history, "loss")


def metric_curves(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Evaluation metrics (every `eval_` figure but losses and times) and sparsity of a Trainer's log, or None."""
    keys = {key for entry in history for key in entry if key.startswith("eval_") and not _NO_METRIC.search(key)}
    curves = {key.removeprefix("eval_").replace("_", " "): _series(history, key) for key in sorted(keys)}
    if sparsity := _series(history, "sparsity"):
        curves["sparsity"] = sparsity
    return _curves({name: curve for name, curve in curves.items() if curve}, history, None)


def learning_rate_curve(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Learning rate of a Trainer's log, or None."""
    curve = _series(history, "learning_rate")
    return _curves({"learning rate": curve}, history, None) if curve else None


def layer_times(layers: Sequence[LayerConversion]) -> str | None:
    """Measured time of each layer, dense against sparse; the `MAX_BARS` slowest ones, or None without times."""
    timed = [
        (layer.name, layer.dense_ms, layer.sparse_ms)
        for layer in layers
        if layer.dense_ms is not None and layer.sparse_ms is not None
    ]
    if not timed:
        return None
    slowest = set(sorted(range(len(timed)), key=lambda i: -timed[i][1])[:MAX_BARS])
    names, dense, sparse = zip(*(times for i, times in enumerate(timed) if i in slowest), strict=True)
    figure, axes = _bars(names, height=0.28)
    axes.barh([row - 0.2 for row in range(len(names))], dense, 0.38, color=DENSE, label="dense")
    axes.barh([row + 0.2 for row in range(len(names))], sparse, 0.38, color=SPARSE, label="sparse")
    axes.set_xlabel("forward + backward, ms")
    _legend(figure, axes)
    return _svg(figure)


def sparsity_bars(layers: Sequence[LayerSparsity]) -> str | None:
    """Sparsity of each layer in percent; the `MAX_BARS` largest layers, or None without layers."""
    if not layers:
        return None
    largest = set(sorted(range(len(layers)), key=lambda i: -layers[i].numel)[:MAX_BARS])
    shown = [layer for i, layer in enumerate(layers) if i in largest]
    figure, axes = _bars([layer.name for layer in shown], height=0.18)
    axes.barh(range(len(shown)), [100 * layer.sparsity for layer in shown], 0.7, color=SPARSE)
    axes.set_xlim(0, 100)
    axes.set_xlabel("zero weights, %")
    return _svg(figure)


def scatter(points: Sequence[tuple[str, float, float]], x_label: str, y_label: str) -> str | None:
    """Named points; None if there is none. With many of them, names are left to the table beside."""
    if not points:
        return None
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.scatter([x for _, x, _ in points], [y for _, _, y in points], s=22, color=SPARSE)
    if len(points) <= MAX_NAMES:
        for name, x, y in points:
            text = axes.annotate(
                _shortened(name, 18), (x, y), xytext=(0, 5), textcoords="offset points", fontsize=7, color=_INK
            )
            text.set(parse_math=False, horizontalalignment="center")
    axes.margins(0.15)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.yaxis.label.set_parse_math(False)
    axes.grid(alpha=0.25, color=_INK, linewidth=0.5)
    _plain(axes)
    return _svg(figure)


def _series(history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    points = []
    for entry in history:
        value, place = entry.get(key), entry.get(_clock(history))
        if isinstance(value, int | float) and isinstance(place, int | float) and math.isfinite(value):
            points.append((float(place), float(value)))
    return points


def _clock(history: Sequence[Mapping[str, Any]]) -> str:
    return "epoch" if any("epoch" in entry for entry in history) else "step"


def _curves(
    curves: Mapping[str, list[tuple[float, float]]], history: Sequence[Mapping[str, Any]], label: str | None
) -> str | None:
    if not curves:
        return None
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    colours = [DENSE, SPARSE, THIRD]
    for index, (name, points) in enumerate(curves.items()):
        # A single point is invisible as a line.
        marker = "o" if len(points) < 20 else None
        axes.plot(*zip(*points, strict=True), label=name, color=colours[index % 3], marker=marker, markersize=3)
    axes.set_xlabel(_clock(history))
    if label:
        axes.set_ylabel(label)
    axes.grid(alpha=0.25, color=_INK, linewidth=0.5)
    _plain(axes)
    _legend(figure, axes)
    return _svg(figure)


def _bars(names: Sequence[str], height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 0.9 + height * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), [_shortened(name) for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.25, color=_INK, linewidth=0.5)
    axes.set_axisbelow(True)
    _plain(axes)
    return figure, axes


def _shortened(name: str, limit: int = 30) -> str:
    return name if len(name) <= limit else "…" + name[1 - limit :]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    for label in legend.get_texts():
        label.set_parse_math(False)


def _svg(figure: Figure) -> str:
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
        axes.tick_params(colors=_INK, labelsize=7)
        axes.xaxis.label.set(color=_INK, fontsize=8)
        axes.yaxis.label.set(color=_INK, fontsize=8)
        for spine in axes.spines.values():
            spine.set_color(_INK)
    for legend in figure.legends:
        for label in legend.get_texts():
            label.set_color(_INK)
    file = io.StringIO()
    # Text as text: it scales, can be searched, and needs no font in the file.
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # In a page the namespaces are implied, and the size follows the column.
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*"', r'\1role="img"', text, count=1)
    return text.replace(_INK, "currentColor")
