"""Forward passes in evaluation mode: dense torch, onnxruntime (dense), and ours."""

import copy
import tempfile
from collections.abc import Callable

import torch
from torch import nn

import sparse_ft
from sparse_ft.bench import TURN_S, variants
from sparse_ft.steps import inference_step
from sparse_ft.tune import interleaved_medians

from .case import Case, Settings
from .models import Workload

WORKLOADS = [
    Workload(model, sparsity, batch, 224)
    for model, sparsity in (("resnet50", 0.95), ("mobilenetv1_100", 0.90))
    for batch in (32, 1)
]


def cases() -> list[Case]:
    return [Case(f"infer/{workload.name}", lambda s, w=workload: measure(w, s)) for workload in WORKLOADS]


def measure(workload: Workload, settings: Settings) -> dict:
    model, images = workload.make()
    model.eval().requires_grad_(False)
    dense = copy.deepcopy(model)
    report = sparse_ft.convert(model, images)
    runs = {v.name: inference_step(v.model, v.batch, bf16=v.bf16) for v in variants(model, images, bf16=True)}
    runs["onnxruntime"] = onnxruntime_step(dense, images, settings.threads)
    medians = interleaved_medians(runs, rounds=settings.rounds, turn_s=TURN_S)
    return {
        "title": workload.title,
        "native": len(report.converted),
        "layers": len(report.layers),
        "note": report.note,
        "ms": {name: seconds * 1e3 for name, seconds in medians.items()},
    }


def onnxruntime_step(model: nn.Module, images: torch.Tensor, threads: int) -> Callable[[], object]:
    """The dense model in onnxruntime's CPU provider, all graph optimisations on."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would go on spinning while the other variants run.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/model.onnx"
        torch.onnx.export(model, (images,), file, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)
