"""The picture of a benchmark: whole training steps, memory, and where the time of the layers goes."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparse_ft.bench import Benchmark
from sparse_ft.conversion import LayerConversion
from sparse_ft.report.plots import DENSE, SPARSE

MAX_GROUPS = 24


def plot_benchmark(benchmark: Benchmark, path: str | Path) -> None:
    """Draws `benchmark` into `path` (png, svg or pdf).

    Layers of one shape and time are drawn as one pair of bars; the `MAX_GROUPS` slowest of these are shown.

    Raises:
        ValueError: nothing was measured, or matplotlib does not write such a file.
    """
    groups = _groups(benchmark.conversion.layers)
    steps, memory = benchmark.steps, benchmark.memory
    if not groups and steps is None:
        raise ValueError("there is nothing to draw: no layer and no step was measured")
    variants = 0 if steps is None else len(steps.variants)
    heights = [0.9 + 0.34 * variants] * bool(variants) + [0.9 + 0.34 * len(groups)] * bool(groups)
    figure = Figure(figsize=(10, 0.6 + sum(heights)), layout="constrained")
    figure.suptitle(benchmark.title, fontsize=11, parse_math=False)
    rows = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    if steps is not None:
        panels = next(rows).subplots(1, 1 + bool(memory), squeeze=False)[0]
        times = dict(sorted(steps.variants.items(), key=lambda item: item[1]))
        ratios = {name: f"  ({ms / steps.sparse_ms:.2f} × sparse)" for name, ms in times.items() if name != "sparse"}
        _variant_bars(panels[0], "training step, ms", times, lambda name: f"{times[name]:,.0f}{ratios.get(name, '')}")
        if memory:
            peaks = {name: memory[name].peak / 2**20 for name in times if name in memory}
            _variant_bars(panels[1], "peak resident memory, MB", peaks, lambda name: f"{peaks[name]:,.0f}")
    if groups:
        _layer_bars(next(rows).subplots(), groups)
    figure.savefig(path, dpi=150)


def _groups(layers: Sequence[LayerConversion]) -> list[tuple[str, float, float, bool]]:
    """(label, dense ms, sparse ms, converted) of measured layers, equal ones added up, in the model's order."""
    found: dict[tuple, list[LayerConversion]] = {}
    for layer in layers:
        if layer.dense_ms is not None and layer.sparse_ms is not None:
            found.setdefault((layer.shape, layer.dense_ms, layer.sparse_ms, layer.converted), []).append(layer)
    groups = []
    for (shape, dense_ms, sparse_ms, converted), members in found.items():
        count = f" and {len(members) - 1} more" if len(members) > 1 else ""
        label = f"{members[0].name}{count}\n{'×'.join(map(str, shape))}"
        groups.append((label, dense_ms * len(members), sparse_ms * len(members), converted))
    slowest = set(sorted(groups, key=lambda group: -max(group[1:3]))[:MAX_GROUPS])
    return [group for group in groups if group in slowest]


def _variant_bars(axes: Axes, title: str, values: dict[str, float], label: Callable[[str], str]) -> None:
    colours = [SPARSE if name.startswith("sparse") else DENSE for name in values]
    bars = axes.barh(range(len(values)), list(values.values()), 0.7, color=colours)
    axes.bar_label(bars, [label(name) for name in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(values)), list(values), fontsize=9)
    axes.set_xlim(0, 1.45 * max(values.values()))
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10, loc="left")
    _plain(axes)


def _layer_bars(axes: Axes, groups: list[tuple[str, float, float, bool]]) -> None:
    labels, dense, sparse, converted = zip(*groups, strict=True)
    places = range(len(groups))
    axes.barh([place - 0.2 for place in places], dense, 0.38, color=DENSE, label="dense")
    # What was measured but not taken is drawn pale.
    colours = [SPARSE if taken else SPARSE + "55" for taken in converted]
    bars = axes.barh([place + 0.2 for place in places], sparse, 0.38, color=colours, label="sparse")
    ratios = [
        f"{d / s:.1f} times as fast" if c else "left dense" for d, s, c in zip(dense, sparse, converted, strict=True)
    ]
    axes.bar_label(bars, ratios, padding=3, fontsize=7)
    axes.set_yticks(list(places), labels, fontsize=7, parse_math=False)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_title("layers, forward and backward, ms", fontsize=10, loc="left")
    axes.legend(loc="upper right", frameon=False, fontsize=8)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)
