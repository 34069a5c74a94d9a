"""Finished runs side by side, for picking a model: how accurate, how sparse, how fast."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from .html import HEADLINE, write_page
from .plots import scatter

INFO_FILE = "sparse_ft.json"
_SKIPPED = ("checkpoint-", "_", ".")
_MOST_METRICS = 4  # columns


@dataclass(frozen=True)
class Run:
    """What the folder of a finished run says of itself.

    Attributes:
        name: Its folder, relative to the one that was given.
        sparsity: Share of zeros over all layers that can be pruned, 0..1.
        metrics: By name.
        dense_ms, sparse_ms: Of one training step, if that was measured.
        compact_bytes: Size of the compact form, if there is one.
        folder: Where it is.
        report: Address of its own page, relative to the gallery; empty if it has none.
    """

    name: str
    model: str
    sparsity: float
    metrics: dict[str, float]
    dense_ms: float | None
    sparse_ms: float | None
    compact_bytes: int | None
    folder: Path
    report: str = ""

    @property
    def speedup(self) -> float | None:
        return self.dense_ms / self.sparse_ms if self.dense_ms and self.sparse_ms else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "folder": str(self.folder), "speedup": self.speedup}


def find_runs(folders: Iterable[str | Path]) -> list[Run]:
    """The runs in these folders: each folder that holds a ``sparse_ft.json``, at most two levels below one of them.

    Raises:
        ValueError: A folder does not exist or has no run in it, or a file is damaged; one line says which.
    """
    runs: dict[Path, Run] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder")
        places = [path.parent for depth in ("", "*/", "*/*/") for path in sorted(folder.glob(f"{depth}{INFO_FILE}"))]
        places = [place for place in places if not any(map(_is_skipped, place.relative_to(folder).parts))]
        if not places:
            raise ValueError(f"{folder} has no finished run: no {INFO_FILE} in it or in its folders")
        for place in places:
            name = folder.resolve().name if place == folder else place.relative_to(folder).as_posix()
            runs.setdefault(place.resolve(), _read(place, name))
    return list(runs.values())


def write_gallery(path: str | Path, runs: Sequence[Run], *, metric: str | None = None, title: str = "Models") -> None:
    """Write one self-contained page: the runs in a table that sorts, and the metric over sparsity and step time.

    Args:
        path: File to write; replaced in one step if it exists. Links to the runs' own pages are relative to it.
        metric: Which one to draw; None takes the one that most runs are judged by.

    Raises:
        ValueError: No run has that metric.
    """
    count = {name: sum(name in run.metrics for run in runs) for run in runs for name in run.metrics}
    ranked = sorted(count, key=lambda name: (name not in HEADLINE, name == "loss", -count[name], name))
    if metric is not None and metric not in count:
        raise ValueError(f"no run has the metric {metric!r}; they have {', '.join(ranked) or 'none'}")
    plots: dict[str, Markup | None] = {}
    notes = []
    if ranked:
        metric = metric or ranked[0]
        ranked = [metric, *(name for name in ranked if name != metric)]
        judged = [(run, run.metrics[metric]) for run in runs if metric in run.metrics]
        by_sparsity = [(run.name, 100 * run.sparsity, value) for run, value in judged]
        by_time = [(run.name, run.sparse_ms, value) for run, value in judged if run.sparse_ms is not None]
        plots[f"{metric} over sparsity"] = _markup(scatter(by_sparsity, "zero weights, %", metric))
        plots[f"{metric} over step time"] = _markup(scatter(by_time, "training step, ms", metric))
        if len(judged) < len(runs):
            notes.append(f"{len(runs) - len(judged)} without {metric}")
        if len(by_time) < len(judged):
            notes.append(f"{len(judged) - len(by_time)} without a measured step")
    here = Path(path).resolve().parent
    linked = [replace(run, report=_address(run.folder.resolve() / "report.html", here)) for run in runs]
    write_page(
        path, "gallery.html.j2", title=title, runs=linked, metrics=ranked[:_MOST_METRICS], plots=plots, notes=notes
    )


def _is_skipped(folder: str) -> bool:
    return folder.startswith(_SKIPPED)


def _read(folder: Path, name: str) -> Run:
    path = folder / INFO_FILE
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        speed = info.get("speed") or {}
        metrics = {str(key).replace("_", " "): value for key, value in info["metrics"].items()}
        weights = list((folder / "sparse").glob("*.safetensors"))
        return Run(
            name=name,
            model=str(info["model"]),
            sparsity=float(info["sparsity"]["sparsity"]),
            metrics={key: float(value) for key, value in metrics.items() if _is_number(value)},
            dense_ms=_positive(speed.get("dense_ms")),
            sparse_ms=_positive(speed.get("sparse_ms")),
            compact_bytes=sum(file.stat().st_size for file in weights) if weights else None,
            folder=folder,
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a run ({type(error).__name__}: {error})") from error


def _address(page: Path, here: Path) -> str:
    """Relative link to a page; "./" keeps a folder named like a scheme ("javascript:") from being one."""
    return f"./{quote(Path(os.path.relpath(page, here)).as_posix())}" if page.is_file() else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: Any) -> float | None:
    return float(value) if _is_number(value) and value > 0 else None


def _markup(plot: str | None) -> Markup | None:
    return None if plot is None else Markup(plot)
