"""Training steps under SWAT against dense ones: time, multiply-adds, and what is kept for the backward pass."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict

import timm
import torch
from torch import Tensor, nn

from sparse_ft import SparseSession
from sparse_ft.bench import TURN_S
from sparse_ft.methods.swat.layers import SWATLayer, swat_layers
from sparse_ft.steps import call, loss_of, make_optimizer, to_channels_last, training_step
from sparse_ft.tune import interleaved_medians

from .case import Case, Settings
from .models import Workload

LR = 0.05  # at a rate that trains, weights come into use and leave it at every step
PERIOD = 10  # steps between two choices of weights and thresholds
WORKLOADS = [Workload("resnet18", sparsity, 32, size) for size in (224, 32) for sparsity in (0.8, 0.9)]


def cases() -> list[Case]:
    return [Case(f"swat/{workload.name}", lambda s, w=workload: measure(w, s)) for workload in WORKLOADS]


def measure(workload: Workload, settings: Settings) -> dict:
    torch.manual_seed(0)
    dense = timm.create_model(workload.model)
    model, batch = copy.deepcopy(dense), torch.randn(workload.batch, 3, workload.size, workload.size)
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    opponents = {
        "dense contiguous": training_step(dense, batch, make_optimizer(dense, workload.optimizer)),
        "dense channels_last": training_step(last, to_channels_last(batch), make_optimizer(last, workload.optimizer)),
    }
    step, times = swat_step(model, workload, batch)
    step()  # the step at which it begins is dense, the next one measures

    def period() -> None:
        for _ in range(PERIOD):
            step()

    seconds = interleaved_medians({"swat": period, **opponents}, rounds=settings.rounds, turn_s=TURN_S)
    steps_ms = [round(1e3 * each, 2) for each in times["step"][-PERIOD:]]
    layers = swat_layers(model)
    return {
        "title": workload.title,
        "workload": asdict(workload),
        "period": PERIOD,
        "swat_ms": 1e3 * seconds["swat"] / PERIOD,
        "dense_ms": 1e3 * min(seconds[name] for name in opponents),
        "opponents_ms": {name: 1e3 * seconds[name] for name in opponents},
        "steps_ms": steps_ms,
        "choosing_ms": 1e3 * statistics.median(times["choosing"][1:]),
        **operations(layers),
        "kept_mib": {
            "dense": kept_for_backward(lambda: call(last, to_channels_last(batch)), last),
            "swat": kept_for_backward(lambda: call(model, batch), model),
        },
        "weights_mib": weights(layers),
    }


def swat_step(
    model: nn.Module, workload: Workload, batch: Tensor
) -> tuple[Callable[[], None], dict[str, list[float]]]:
    """A training step, and lists to which it adds seconds: of steps, and of choosing weights anew."""
    optimizer = make_optimizer(model, workload.optimizer)
    for group in optimizer.param_groups:
        group["lr"] = LR
    recipe = (
        "modifiers:\n  - !SWATModifier {params: __ALL_PRUNABLE__, start_epoch: 0, end_epoch: 1,"
        f" sparsity: {workload.sparsity}, update_period: {PERIOD}}}"
    )
    session = SparseSession(model, recipe, optimizer, 10**6)
    times: dict[str, list[float]] = {"step": [], "choosing": []}
    model.train()

    def step() -> None:
        began = time.perf_counter()
        loss_of(call(model, batch)).backward()
        session.before_step()
        optimizer.step()
        model.zero_grad(set_to_none=True)
        due = session.step > 0 and session.step % PERIOD == 0
        before = time.perf_counter()
        session.after_step()
        if due:
            times["choosing"].append(time.perf_counter() - before)
        times["step"].append(time.perf_counter() - began)

    return step, times


def operations(layers: dict[str, SWATLayer]) -> dict:
    """Multiply-adds that the kernels did, as shares of dense ones, beside what SWAT's paper counts."""
    products = [layer.swat.products for layer in layers.values()]
    dense = sum(each.operations.dense for each in products)
    done = {
        name: 3 * sum(getattr(each.operations, name) for each in products) / dense
        for name in ("forward", "input_grad", "weight_grad")
    }
    forms = [form for each in products for form in each.forms.values()]
    return {"operations": done, "products": len(forms), "sparse_products": forms.count("sparse")}


def kept_for_backward(forward: Callable[[], object], model: nn.Module) -> float:
    """MiB of the tensors that a forward pass saves, parameters apart."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()  # alive until all is counted: storage that is freed would be counted under one address
    del output
    return sum(sizes.values()) / 2**20


def weights(layers: dict[str, SWATLayer]) -> dict[str, float]:
    """MiB that the backward pass reads of weights: dense ones, or the values in use and their positions."""
    dense = sum(layer.weight.numel() for layer in layers.values())
    used = [layer.swat.active.used for layer in layers.values()]
    values = sum(each.values.numel() for each in used)
    positions = sum(tensor.numel() for each in used for tensor in each.pattern[2:])  # of the transpose
    return {"dense": dense / 2**18, "values": values / 2**18, "positions": positions / 2**18}
