"""What a training step holds: weights, gradients, optimizer state, and the peak of the process."""

from dataclasses import asdict

import sparse_ft
from sparse_ft.bench import variants
from sparse_ft.footprint import measure_footprint

from .case import Case, Settings
from .models import Workload

WORKLOADS = [Workload("resnet50", 0.95, 16, 224, "adamw")]


def cases() -> list[Case]:
    return [Case(f"memory/{workload.name}", lambda s, w=workload: measure(w, s)) for workload in WORKLOADS]


def measure(workload: Workload, settings: Settings) -> dict:
    model, batch = workload.make()
    sparse_ft.convert(model, batch, policy="always")
    footprints = {
        variant.name: measure_footprint(variant, optimizer=workload.optimizer, keep_memory=True)
        for variant in variants(model, batch, bf16=True)
    }
    return {
        "title": workload.title,
        "optimizer": workload.optimizer,
        "variants": {name: {**asdict(f), "state": f.state} for name, f in footprints.items()},
    }
