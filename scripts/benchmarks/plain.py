"""A loop of one's own, in which nobody has set malloc: what it is worth that the core keeps large results.

Such a setting lasts until a process ends, and this one has made it: each case runs in a fresh process.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

import sparse_ft
from sparse_ft.bench import variants
from sparse_ft.ops import _native
from sparse_ft.steps import inference_step, make_optimizer, training_step
from sparse_ft.tune import interleaved_medians

from .case import Case, Settings
from .models import Workload

TURN_S = 2.0  # several passes: the first of a turn finds nothing kept, and is not counted
WORKLOADS = [
    ("forward", Workload("mobilenetv1_100", 0.90, 32, 224)),
    ("forward", Workload("resnet50", 0.95, 32, 224)),
    ("training", Workload("resnet18", 0.95, 32, 224)),
]


def cases() -> list[Case]:
    return [Case(f"plain/{what}-{work.name}", lambda s, p=(what, work): measure(*p, s)) for what, work in WORKLOADS]


def measure(what: str, workload: Workload, settings: Settings) -> dict:
    task = json.dumps({"what": what, "workload": asdict(workload), "settings": asdict(settings)})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plain", task], cwd=Path(__file__).parents[1], stdout=subprocess.PIPE,
        text=True, check=True,
    )  # fmt: skip
    return {"title": workload.title, "what": what, "ms": json.loads(done.stdout.splitlines()[-1])}


def _measure_here(what: str, workload: Workload, settings: Settings) -> dict[str, float]:
    torch.set_num_threads(settings.threads)
    model, batch = workload.make()
    if what == "forward":
        model.eval().requires_grad_(False)
    sparse_ft.convert(model, batch)
    runs: dict[str, Callable[[], object]] = {}
    for variant in variants(model, batch):
        if what == "forward":
            runs[variant.name] = inference_step(variant.model, variant.batch)
        else:
            optimizer = make_optimizer(variant.model, workload.optimizer)
            runs[variant.name] = training_step(variant.model, variant.batch, optimizer)
    runs["sparse, nothing kept"] = _returning(runs["sparse"])
    medians = interleaved_medians(runs, rounds=settings.rounds, turn_s=TURN_S)
    return {name: seconds * 1e3 for name, seconds in medians.items()}


def _returning(run: Callable[[], object]) -> Callable[[], None]:
    """The same with blocks that go back as soon as they are freed."""

    def wrapped() -> None:
        _native.keep_blocks(False)
        try:
            run()
        finally:
            _native.keep_blocks(True)

    return wrapped


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps(_measure_here(task["what"], Workload(**task["workload"]), Settings(**task["settings"]))))
