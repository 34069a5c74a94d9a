#!/usr/bin/env python
"""What a SparseSession adds to the training step of a dense model, in processor time.

    python scripts/benchmarks/session_overhead.py [--rounds 15]

Two copies of a model take turns, one with a recipe at work: before its pruning begins, and with masks held while all
layers are dense. "in its calls" counts before_step and after_step alone; the whole step also has the gradient hooks.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import nn

from sparse_ft import SparseSession
from sparse_ft.memory import keep_freed_memory
from sparse_ft.tables import format_table

RECIPE = """
modifiers:
  - !EpochRangeModifier {{start_epoch: 0, end_epoch: 1000}}
  - !LearningRateFunctionModifier {{lr_func: cosine, init_lr: 0.01, final_lr: 0.0, start_epoch: 0, end_epoch: 1000}}
  - !GMPruningModifier
    {{params: __ALL_PRUNABLE__, ignore: [conv1, fc], init_sparsity: 0.1, final_sparsity: 0.9, start_epoch: {start},
     end_epoch: 900, update_frequency: 1}}
"""
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20 widths, 64²": (
        lambda: timm.create_model("resnet18", num_classes=10, layers=(3, 3, 3, 0), channels=(16, 32, 64, 64)), 64,
    ),
    "ResNet-18, 64²": (lambda: timm.create_model("resnet18", num_classes=10), 64),
}  # fmt: skip
BATCH = 32


def measure(make: Callable[[], nn.Module], side: int, start: int, rounds: int) -> list[str]:
    torch.manual_seed(0)
    models = make(), make()
    optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for model in models]
    session = SparseSession(models[1], RECIPE.format(start=start), optimizers[1], 100)
    images, labels = torch.randn(BATCH, 3, side, side), torch.randint(0, 10, (BATCH,))
    whole: tuple[list[float], list[float]] = ([], [])
    calls = []
    for turn in range(rounds + 1):
        for which in (0, 1) if turn % 2 else (1, 0):
            times = [time.process_time()]
            F.cross_entropy(models[which](images), labels).backward()
            times.append(time.process_time())
            if which:
                session.before_step()
            times.append(time.process_time())
            optimizers[which].step()
            times.append(time.process_time())
            if which:
                session.after_step()
            times.append(time.process_time())
            optimizers[which].zero_grad()
            if turn:  # the first one warms up, and prunes
                whole[which].append(times[-1] - times[0])
                if which:
                    calls.append(times[2] - times[1] + times[4] - times[3])
    plain, with_session = (1000 * statistics.median(each) for each in whole)
    own = 1000 * statistics.median(calls)
    return [
        f"{plain:.1f}",
        f"{with_session:.1f}",
        f"{with_session / plain - 1:+.1%}",
        f"{own:.2f}",
        f"{own / plain:.2%}",
    ]


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="of which medians are taken (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    rows = [
        [name, state, *measure(make, side, start, options.rounds)]
        for name, (make, side) in MODELS.items()
        for state, start in (("before pruning", 500), ("masks held", 0))
    ]
    headers = ["model", "state", "step, ms", "with session, ms", "more", "in its calls, ms", "share"]
    print(format_table(headers, rows))


if __name__ == "__main__":
    main()
