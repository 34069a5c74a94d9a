#!/usr/bin/env python
"""Time of gradual pruning from random weights: native where faster, against masked dense and plain dense training.

    python scripts/benchmarks/from_scratch.py [--model resnet18] [--sparsity 0.95] [--epochs 6] [--threads 1]

The three trainings take turns, an epoch each, on the same batches of 64-pixel images. Sparsity rises over the first
two thirds of the epochs. Everything counts, measuring the layers included. Dense layers have torch's channels_last
layout.
"""

import argparse
import os
import time
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_ft import SparseSession
from sparse_ft.live import LiveForms, native_layers
from sparse_ft.memory import keep_freed_memory
from sparse_ft.tables import format_table

RECIPE = """
modifiers:
  - !EpochRangeModifier {{start_epoch: 0, end_epoch: {epochs}}}
  - !GMPruningModifier
    {{params: __ALL_PRUNABLE__, ignore: [conv1, fc], init_sparsity: 0.5, final_sparsity: {sparsity}, start_epoch: 0,
     end_epoch: {end}, update_frequency: 1}}
"""
SIDE = 64


class Training:
    """A model in training; `form` is "dense", "masked dense" or "native"."""

    def __init__(self, form: str, options: argparse.Namespace, steps: int, example: Tensor):
        torch.manual_seed(0)
        self.form = form
        self.model = timm.create_model(options.model, num_classes=10)
        if form != "native":
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.02, momentum=0.9, fused=True)
        text = RECIPE.format(epochs=options.epochs, end=options.epochs * 2 // 3, sparsity=options.sparsity)
        self.session = None if form == "dense" else SparseSession(self.model, text, self.optimizer, steps)
        self.live = LiveForms(self.session, {}, lambda: example) if form == "native" else None
        self.seconds, self.cpu_seconds = [], []

    def epoch(self, images: Tensor, labels: Tensor, batch_size: int) -> None:
        began, cpu_began = time.perf_counter(), time.process_time()
        for batch, targets in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            F.cross_entropy(self.model(batch), targets).backward()
            if self.session is not None:
                self.session.before_step()
            self.optimizer.step()
            if self.session is not None:
                self.session.after_step()
            self.optimizer.zero_grad()
            if self.live is not None:
                self.live.follow()
        self.seconds.append(time.perf_counter() - began)
        self.cpu_seconds.append(time.process_time() - cpu_began)


def load(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    data = datasets.load_dataset("parquet", data_files=str(folder / "train.parquet"), split=f"train[:{count}]")
    pixels = np.stack([np.asarray(row["image"].convert("RGB").resize((SIDE, SIDE))) for row in data])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images.contiguous(memory_format=torch.channels_last), torch.tensor(data["label"])


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    shared = Path(os.environ.get("SPARSE_FT_SHARED", "../shared"))
    parser.add_argument("--model", default="resnet18", help="of timm (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=shared / "data/imagenette224", help="folder with train.parquet")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--images", type=int, default=640, help="of an epoch (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    images, labels = load(options.data, options.images)
    steps = len(images) // options.batch_size
    trainings = [
        Training(form, options, steps, images[: options.batch_size]) for form in ("dense", "masked dense", "native")
    ]
    for epoch in range(options.epochs):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))[
            : steps * options.batch_size
        ]
        for training in trainings if epoch % 2 else trainings[::-1]:
            training.epoch(images[order], labels[order], options.batch_size)
        sparse = trainings[-1]
        times = ", ".join(f"{each.form} {each.cpu_seconds[-1]:.1f}" for each in trainings)
        zeros, native = sparse.session.sparsity().overall, len(native_layers(sparse.model))
        print(f"epoch {epoch + 1}: {zeros:.1%} zeros, {native} native layers; CPU s {times}", flush=True)
    rows = [
        [t.form, f"{sum(t.cpu_seconds):.1f}", f"{sum(trainings[0].cpu_seconds) / sum(t.cpu_seconds):.2f}",
         f"{trainings[0].cpu_seconds[-1] / t.cpu_seconds[-1]:.2f}", f"{sum(t.seconds):.1f}"]
        for t in trainings
    ]  # fmt: skip
    headers = ["training", "CPU s", "times as fast as dense", "in the last epoch", "wall s"]
    print(format_table(headers, rows))


if __name__ == "__main__":
    main()
