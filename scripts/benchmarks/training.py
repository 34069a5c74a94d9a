"""Whole training steps: forward, backward, optimizer."""

from dataclasses import asdict, replace

import sparse_ft
from sparse_ft.bench import compare_steps

from .case import Case, Settings
from .models import Workload

WORKLOADS = [
    Workload("resnet18", 0.95, 32, 224),
    Workload("resnet50", 0.95, 16, 224),
    Workload("resnet50", 0.90, 16, 224),
    Workload("mobilenetv1_100", 0.90, 32, 224),
    Workload("resnet18", 0.95, 64, 32),
    Workload("bert-base", 0.97, 16, 128, "adamw"),
    Workload("vit_small_patch16_224", 0.90, 16, 224, "adamw"),
]
# The same at 70 %, each once: never slower than dense.
WORKLOADS += list(dict.fromkeys(replace(workload, sparsity=0.70) for workload in WORKLOADS))


def cases() -> list[Case]:
    return [Case(f"train/{workload.name}", lambda s, w=workload: measure(w, s)) for workload in WORKLOADS]


def measure(workload: Workload, settings: Settings) -> dict:
    model, batch = workload.make()
    report = sparse_ft.convert(model, batch)
    row = {
        "title": workload.title,
        "workload": asdict(workload),
        "native": len(report.converted),
        "layers": len(report.layers),
        "note": report.note,
        "choice": report.step and asdict(report.step),
    }
    if not report.converted:
        return row
    steps = compare_steps(model, batch, steps=settings.rounds, optimizer=workload.optimizer, bf16=True)
    return {**row, "step": {**steps.to_dict(), "dense_bf16_ms": steps.dense_bf16_ms}}
