"""The HTML report of a run: one file that opens anywhere and asks nothing of the network."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sparse_ft.atomic import replacing
from sparse_ft.bench import StepComparison
from sparse_ft.conversion import ConversionReport
from sparse_ft.masks import SparsityReport

from .plots import MAX_BARS, layer_times, learning_rate_curve, loss_curves, metric_curves, sparsity_bars

# Metrics in [0, 1] that a run is judged by.
HEADLINE = ("accuracy", "f1", "matthews correlation", "exact match")


@dataclass(frozen=True)
class _Row:
    """One layer in the table: what it is and how it ran."""

    name: str
    kind: str
    shape: str
    nnz: int
    numel: int
    sparsity: float
    runs: str
    why: str
    dense_ms: float | None
    sparse_ms: float | None


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    sparsity: SparsityReport,
    conversion: ConversionReport | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    comparison: StepComparison | Mapping[str, Any] | None = None,
    evals: Mapping[str, Any] | None = None,
) -> None:
    """Write a self-contained HTML report of a run: figures, curves and a table of the layers.

    Everything is inside the file; its content security policy forbids requests and any script but its own. Parts
    for which there is nothing to show are left out.

    Args:
        path: File to write; replaced in one step if it exists.
        title: Heading and window title.
        summary: Facts by label in the order to show them: model, dataset, recipe, sparsity before ... Numbers are
            shown with four significant digits; pass strings for another form.
        sparsity: Of the model after the run.
        conversion: What `convert` did; None if the model ran dense.
        history: Log of a Trainer (`trainer.state.log_history`).
        comparison: Step times, or a mapping with `dense_ms` and `sparse_ms` in milliseconds.
        evals: Metrics by name, with or without `eval_` in front.
    """
    times = _times(comparison)
    evals = {name.removeprefix("eval_").replace("_", " "): value for name, value in (evals or {}).items()}
    write_page(
        path,
        "report.html.j2",
        title=title,
        summary=summary,
        evals=evals,
        headline={name: value for name, value in evals.items() if name in HEADLINE and isinstance(value, float)},
        sparsity=sparsity,
        times=times,
        rows=_rows(sparsity, conversion),
        has_times=conversion is not None and any(layer.dense_ms is not None for layer in conversion.layers),
        conversion=conversion,
        max_bars=MAX_BARS,
        plots={
            name: Markup(plot) if plot else None
            for name, plot in (
                ("loss", loss_curves(history)),
                ("metrics", metric_curves(history)),
                ("learning_rate", learning_rate_curve(history)),
                ("times", layer_times(conversion.layers) if conversion else None),
                ("sparsity", sparsity_bars(sparsity.layers)),
            )
        },
    )


def write_page(path: str | Path, template: str, **content: Any) -> None:
    """Write a page of ours: style and script inside, every other text escaped, no request allowed.

    Args:
        template: File in ``templates``.
        content: What it shows.
    """
    environment = Environment(loader=PackageLoader("sparse_ft.report"), autoescape=True, undefined=StrictUndefined)
    environment.filters["figure"] = _figure
    script = (files("sparse_ft.report") / "templates" / "sort.js").read_text(encoding="utf-8")
    page = environment.get_template(template).render(
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((files("sparse_ft.report") / "templates" / "style.css").read_text(encoding="utf-8")),
        **content,
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _rows(sparsity: SparsityReport, conversion: ConversionReport | None) -> list[_Row]:
    conversions = {layer.name: layer for layer in conversion.layers} if conversion else {}
    rows = []
    for layer in sparsity.layers:
        converted = conversions.get(layer.name)
        rows.append(
            _Row(
                name=layer.name,
                kind=layer.kind,
                shape=" × ".join(map(str, layer.shape)),
                nnz=layer.nnz,
                numel=layer.numel,
                sparsity=layer.sparsity,
                runs="sparse" if converted and converted.converted else "dense",
                why=(converted.reason if converted else "") or layer.note,
                dense_ms=converted.dense_ms if converted else None,
                sparse_ms=converted.sparse_ms if converted else None,
            )
        )
    return rows


def _times(comparison: StepComparison | Mapping[str, Any] | None) -> dict[str, float] | None:
    if comparison is None:
        return None
    if isinstance(comparison, StepComparison):
        comparison = comparison.to_dict()
    dense, sparse = float(comparison["dense_ms"]), float(comparison["sparse_ms"])
    return {"dense_ms": dense, "sparse_ms": sparse, "speedup": dense / sparse}


def _figure(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
