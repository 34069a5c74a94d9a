"""Memory of a training step, measured in a process of its own.

Memory that one variant has freed would serve the next one in the same process, so each is measured in a fresh one: it
loads the model, resets its peak (`/proc/self/clear_refs`), trains two steps and reads the peak of its resident memory
(`VmHWM`), libraries included. The reset is Linux's; elsewhere there is no figure.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparse_ft.memory import keep_freed_memory, return_freed_memory
from sparse_ft.nn import SparseModule
from sparse_ft.steps import call, loss_of, make_optimizer, mixed_precision, training_step

if TYPE_CHECKING:
    from sparse_ft.bench import Variant

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training step.

    Attributes:
        peak: largest resident memory of the process during the step.
        before: resident memory of the same process before the first step: libraries, model, batch.
        weights, gradients, optimizer: parameters, their gradients, the optimizer's state.
        indices: index tensors of the sparse layers.
    """

    peak: int
    before: int
    weights: int
    gradients: int
    optimizer: int
    indices: int

    @property
    def state(self) -> int:
        """Weights, gradients and optimizer state together."""
        return self.weights + self.gradients + self.optimizer


def can_measure() -> bool:
    """Whether this system says what a process has resident at most."""
    return _CLEAR_REFS.exists()


def measure_footprint(variant: "Variant", *, optimizer: str = "sgd", keep_memory: bool = False) -> Footprint:
    """Trains `variant` for two steps in a new process; with as many threads as this one.

    Args:
        optimizer: "sgd" (momentum) or "adamw".
        keep_memory: with `keep_freed_memory`, as in this process; otherwise all freed memory goes back.

    Raises:
        RuntimeError: the process failed; the message has its last line.
    """
    task = {
        "model": variant.model, "batch": variant.batch, "bf16": variant.bf16, "optimizer": optimizer,
        "keep_memory": keep_memory, "threads": torch.get_num_threads(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="sparse_ft-") as folder:
        path = Path(folder) / "task.pt"
        torch.save(task, path)
        command = [sys.executable, "-m", "sparse_ft.footprint", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"memory of the step ({variant.name}) could not be measured: {lines[-1]}")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def _measure(path: str) -> Footprint:
    task = torch.load(path, weights_only=False)  # this package's own file, see above
    torch.set_num_threads(task["threads"])
    if task["keep_memory"]:
        keep_freed_memory()
    else:
        return_freed_memory()
    model, batch, bf16 = task["model"], task["batch"], task["bf16"]
    optimizer = make_optimizer(model, task["optimizer"])
    step = training_step(model, batch, optimizer, bf16=bf16)
    before = _resident("VmRSS")
    _CLEAR_REFS.write_text("5")  # the peak starts anew
    step()
    step()
    peak = _resident("VmHWM")
    with mixed_precision(bf16):
        loss = loss_of(call(model, batch))
    loss.backward()
    return Footprint(
        peak=peak,
        before=before,
        weights=_bytes(model.parameters()),
        gradients=_bytes(parameter.grad for parameter in model.parameters()),
        optimizer=_bytes(value for state in optimizer.state.values() for value in state.values()),
        indices=_bytes(index for layer in _sparse_layers(model) for index in layer.pattern.buffers()),
    )


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _bytes(values: Any) -> int:
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _sparse_layers(model: nn.Module) -> list[SparseModule]:
    return [module for module in model.modules() if isinstance(module, SparseModule)]


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(sys.argv[1]))))
