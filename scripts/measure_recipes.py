#!/usr/bin/env python
"""Runs recipes on real data, each in a process of its own: accuracy, sparsity, time and memory.

    python scripts/measure_recipes.py --study gmp90 --output out/recipes [--runs gmp dense] [--epochs 30] [--threads 1]

gmp90              ResNet-20 for CIFAR-10 from pretrained weights: gradual pruning to 90 %, and dense training as long
pretrained         the same network for fewer epochs: 80 and 95 %, 2:4, whole filters
scratch            the same network from random weights: GMP, AC/DC, RigL, SET
methods            the same network under every method, on half of the images and for few epochs
mobilenet          MobileNetV1 x0.75 on imagenette from ImageNet's weights: GMP
mobilenet-scratch  the same from random weights
sst2               MiniLM-L6 on SST-2: movement pruning, and second-order pruning of the fine-tuned network

All runs of a study start from the same weights and see the same batches. Each leaves RUN.json in
OUTPUT/STUDY, with a point for every evaluation, as soon as it has that; `results.md` and `results.png` gather what is
there. A run that is finished is not repeated; one that was stopped goes on from its last evaluation.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from command_line import DATA, make_parser
from matplotlib.figure import Figure
from PIL import Image
from real_data import CifarResNet, imagenette_mobilenet, load_minilm, machine, markdown_table, write_json
from torch import Tensor
from train_bundled_resnet20 import Split, augment, load_splits, normalise
from transformers import TrainerCallback

from sparse_ft import Recipe, SparseTrainer, SparseTrainingArguments
from sparse_ft.atomic import replacing
from sparse_ft.checkpoint import last_checkpoint
from sparse_ft.data import load_data, prepare
from sparse_ft.masks import sparsity
from sparse_ft.nn import SparseModule

SO_FAR = "measured.json"  # in a checkpoint: what was measured until then
RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class Study:
    """A model, its data, and the recipes to run on it.

    Attributes:
        load: (data folder, seed) -> what SparseTrainer takes.
        runs: recipe file and its arguments by the name of the run; no file trains dense.
        optimizer: class and its arguments, the learning rate among them for runs that do not set it.
        tuned: runs that start from the weights that the run "dense" ends with; the first one must be over.
        training: training arguments of a run, beside those that all have.
        mixed: runs that train on images half of which are mixed with others; only the teacher knows what they show.
        points: evaluations of a run.
    """

    load: Callable[[Path, int], dict[str, Any]]
    epochs: int
    batch_size: int
    optimizer: tuple[type[torch.optim.Optimizer], dict[str, Any]]
    runs: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    tuned: tuple[str, ...] = ()
    training: dict[str, dict[str, Any]] = field(default_factory=dict)
    mixed: tuple[str, ...] = ()
    points: int = 3


def resnet20_for_cifar(data: Path, *, pretrained: bool) -> CifarResNet:
    model = CifarResNet(20, 10)
    if pretrained:
        saved = torch.load(data / "checkpoints/resnet20-12fca82f.th", weights_only=True, map_location="cpu")
        model.load_state_dict({name.removeprefix("module."): value for name, value in saved["state_dict"].items()})
    return model


def load_cifar(data: Path, seed: int, *, pretrained: bool = True, images: int | None = None) -> dict[str, Any]:
    model = resnet20_for_cifar(data, pretrained=pretrained)
    splits, _ = load_splits(str(data / "cifar10"))
    train_images, train_labels = splits["train"]
    return image_parts(model, (train_images[:images], train_labels[:images]), splits["test"])


def load_imagenette(data: Path, seed: int, *, pretrained: bool = True, side: int = 128) -> dict[str, Any]:
    """MobileNetV1 x0.75 and images of `side` pixels; its weights were trained on 224."""
    model = imagenette_mobilenet(data / "checkpoints/mobilenetv1_075_imagenet_keras.pth" if pretrained else None)
    files = {split: str(data / f"imagenette224/{split}.parquet") for split in ("train", "validation")}
    loaded = datasets.load_dataset("parquet", data_files=files)
    splits = {}
    for split in files:
        pixels = np.stack([
            np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR))
            for image in loaded[split]["image"]
        ])  # fmt: skip
        labels = torch.tensor(loaded[split]["label"])
        splits[split] = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels
    return image_parts(model, splits["train"], splits["validation"], to_both_sides_of_zero)


def image_parts(
    model: torch.nn.Module,
    train: Split,
    test: Split,
    to_float: Callable[[Tensor], Tensor] = normalise,
) -> dict[str, Any]:
    return {
        "model": model,
        "train_dataset": Pairs(train, distort=True),
        "eval_dataset": Pairs(test, distort=False),
        "data_collator": partial(collate, to_float=to_float),
        "compute_metrics": accuracy,
    }


def to_both_sides_of_zero(images: Tensor) -> Tensor:
    """As TensorFlow's networks have them: from -1 to 1."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


class Pairs(torch.utils.data.Dataset):
    """Images as bytes, their labels, and whether the images are to be distorted."""

    def __init__(self, split: Split, *, distort: bool):
        self.images, self.labels = split
        self.distort = distort

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, bool]:
        return self.images[i], self.labels[i], self.distort


def collate(
    examples: list[tuple[Tensor, Tensor, bool]],
    to_float: Callable[[Tensor], Tensor] = normalise,
    mixed: bool = False,
) -> dict[str, Tensor]:
    """A batch; in training, images are cropped out of a zero border and mirrored at random, and `mixed`: each with a
    chance of one half becomes a random mean of itself and another one (mixup, Zhang et al. 2018)."""
    images, training = torch.stack([image for image, _, _ in examples]), examples[0][2]
    pixels = to_float(augment(images) if training else images)
    if training and mixed:
        own = torch.rand(len(pixels), 1, 1, 1).where(torch.rand(len(pixels), 1, 1, 1) < 0.5, 1.0)
        pixels = pixels * own + pixels[torch.randperm(len(pixels))] * (1 - own)
    return {"pixel_values": pixels, "labels": torch.stack([label for _, label, _ in examples])}


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def load_sst2(data: Path, seed: int) -> dict[str, Any]:
    sst2 = load_data(str(data / "glue_sst2"), seed=seed, max_train_samples=3000)
    model, tokenizer = load_minilm(data, sst2)
    prepared = prepare(sst2, model, tokenizer, max_length=64, seed=seed)
    return {
        "model": model,
        "train_dataset": prepared.train,
        "eval_dataset": prepared.eval,
        "data_collator": prepared.collator,
        "compute_metrics": prepared.compute_metrics,
        "preprocess_logits_for_metrics": prepared.preprocess_logits,
    }


MOMENTUM = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
CIFAR = {"dense": ["conv1", "linear"], "lr": 0.02}
SCRATCH = {"dense": ["conv1", "linear"], "lr": 0.1}
# Of a depthwise filter every weight counts, and all of them together are few.
MOBILENET = {"dense": ["conv_stem", "re:.*conv_dw", "classifier"], "scope": "global"}

STUDIES = {
    "gmp90": Study(
        load_cifar, 24, 64, (torch.optim.SGD, {"lr": 0.03, **MOMENTUM}),
        {
            "GMP": ("gmp_distilled.yaml", {"dense": ["conv1", "linear"]}),
            "GMP unclipped": ("gmp_distilled.yaml", {"dense": ["conv1", "linear"], "lr": 0.02, "ramp": 0.3}),
            "GMP mixed": (
                "gmp_distilled.yaml", {"dense": ["conv1", "linear"], "lr": 0.02, "ramp": 0.2, "hardness": 1.0}
            ),
            "dense": ("", {}),
        },
        training={"GMP unclipped": {"max_grad_norm": 0.0}, "GMP mixed": {"max_grad_norm": 0.0}},
        mixed=("GMP mixed",),
        points=6,
    ),
    "pretrained": Study(
        load_cifar, 4, 64, (torch.optim.SGD, {"lr": 0.03, **MOMENTUM}),
        {
            "dense": ("", {}),
            "GMP 80": ("gmp_distilled.yaml", {"dense": ["conv1", "linear"], "sparsity": 0.8}),
            "GMP 95": ("gmp_distilled.yaml", {"dense": ["conv1", "linear"], "sparsity": 0.95}),
            "2:4": ("2of4.yaml", {**CIFAR, "lr": 0.03}),
            "structured": ("structured.yaml", {"lr": 0.03}),
        },
    ),
    "scratch": Study(
        partial(load_cifar, pretrained=False), 6, 64, (torch.optim.SGD, {"lr": 0.1, **MOMENTUM}),
        {
            "dense": ("", {}),
            "GMP 80": ("gmp.yaml", {**SCRATCH, "scope": "global", "sparsity": 0.8}),
            "GMP 90": ("gmp.yaml", {**SCRATCH, "scope": "global", "sparsity": 0.9}),
            "GMP 95": ("gmp.yaml", {**SCRATCH, "scope": "global", "sparsity": 0.95}),
            "AC/DC": ("acdc.yaml", {**SCRATCH, "phase": 1}),
            "RigL": ("rigl.yaml", SCRATCH),
            "SET": ("set.yaml", SCRATCH),
        },
    ),
    "methods": Study(
        partial(load_cifar, images=3750), 6, 64, (torch.optim.SGD, {"lr": 0.02, **MOMENTUM}),
        {
            "dense": ("", {}),
            "frozen mask": ("one_shot.yaml", CIFAR),
            "GMP": ("gmp.yaml", {**CIFAR, "scope": "global"}),
            "AC/DC": ("acdc.yaml", {**CIFAR, "phase": 1}),
            "RigL": ("rigl.yaml", CIFAR),
            "SWAT": ("swat.yaml", {"lr": 0.02, "sparsity": 0.9}),
            # Of channels: about 0.9 of the weights.
            "FBPS": ("fbps.yaml", {"lr": 0.02, "sparsity": 0.68, "prune_until": 0.6}),
        },
    ),
    "mobilenet": Study(
        load_imagenette, 3, 32, (torch.optim.SGD, {"lr": 0.01, **MOMENTUM}),
        {
            "dense": ("", {}),
            **{
                f"GMP {percent}": ("gmp_distilled.yaml", {**MOBILENET, "lr": 0.02, "sparsity": percent / 100})
                for percent in (80, 90, 95)
            },
        },
    ),
    "mobilenet-scratch": Study(
        partial(load_imagenette, pretrained=False), 4, 32, (torch.optim.SGD, {"lr": 0.05, **MOMENTUM}),
        {
            "dense": ("", {}),
            **{
                f"GMP {percent}": ("gmp.yaml", {**MOBILENET, "lr": 0.05, "sparsity": percent / 100})
                for percent in (80, 90, 95)
            },
        },
    ),
    "sst2": Study(
        load_sst2, 1, 32, (torch.optim.AdamW, {"lr": 2e-4, "weight_decay": 0.01}),
        {
            "dense": ("", {}),
            "oBERT": ("obert.yaml", {"sparsity": 0.9, "lr": 2e-4, "num_grads": 64}),
            "movement": ("movement.yaml", {"sparsity": 0.8, "lr": 2e-4}),
        },
        tuned=("oBERT",),
    ),
}  # fmt: skip


class Points(TrainerCallback):
    """Notes accuracy, sparsity and the time spent on training at each evaluation."""

    def __init__(self, result: dict[str, Any], path: Path):
        self.result, self.path = result, path
        self.trainer: SparseTrainer
        self.spent, self.cpu = 0.0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._go_on()

    def _go_on(self) -> None:
        self.since, self.cpu_since = time.perf_counter(), time.process_time()

    def on_save(self, args, state, control, **kwargs):
        so_far = {"result": self.result, "spent": self.spent, "cpu": self.cpu}
        write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / SO_FAR, so_far)
        self._go_on()

    def resume(self, checkpoint: str) -> None:
        """Takes over what was measured until the checkpoint."""
        so_far = json.loads((Path(checkpoint) / SO_FAR).read_text())
        self.result.update(so_far["result"])
        self.spent, self.cpu = so_far["spent"], so_far["cpu"]

    def on_step_end(self, args, state, control, **kwargs):
        # Evaluation comes after the step's end: its time is between this and the next beginning.
        self.spent += time.perf_counter() - self.since
        self.cpu += time.process_time() - self.cpu_since
        self._go_on()

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        native = sum(isinstance(module, SparseModule) for module in self.trainer.model.modules())
        point = {
            "epoch": round(float(state.epoch or 0), 3),
            "accuracy": metrics["eval_accuracy"],
            "loss": metrics["eval_loss"],
            "sparsity": share_of_zeros(self.trainer.model),
            "native": native,
            "seconds": round(self.spent, 1),
            "cpu_seconds": round(self.cpu, 1),
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }
        self.result["points"].append(point)
        write_json(self.path, self.result)
        print(json.dumps(point), flush=True)
        self._go_on()


def share_of_zeros(model: torch.nn.Module) -> float:
    """Over the layers that pruning usually takes: neither stem nor head nor embeddings."""
    layers = [layer for layer in sparsity(model).layers if not layer.note]
    return 1 - sum(layer.nnz for layer in layers) / sum(layer.numel for layer in layers)


def run_one(study: Study, name: str, options: argparse.Namespace) -> None:
    file, recipe_args = study.runs[name]
    epochs = options.epochs or study.epochs
    torch.manual_seed(options.seed)
    path = options.output / options.study / f"{slug(name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    optimizer, settings = study.optimizer
    result = {
        "study": options.study, "run": name, "recipe": file, "recipe_args": recipe_args, "epochs": epochs,
        "batch_size": study.batch_size, "optimizer": [optimizer.__name__, settings], "seed": options.seed,
        "machine": machine(), "finished": False, "points": [],
    }  # fmt: skip
    points = Points(result, path)
    parts = study.load(options.data, options.seed)
    weights = path.with_name("dense.pt")
    if name in study.tuned:
        parts["model"].load_state_dict(torch.load(weights, weights_only=True))
    if name in study.mixed:
        parts["data_collator"] = partial(parts["data_collator"], mixed=True)
    if not file:
        parts["model"].to(memory_format=torch.channels_last)  # the faster one for dense convolutions
    steps = -(-len(parts["train_dataset"]) // study.batch_size)
    between = steps * max(1, epochs // study.points)
    checkpoints = path.with_suffix(".checkpoints")
    args = SparseTrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=epochs,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=study.batch_size,
        per_device_eval_batch_size=250,
        eval_strategy="steps",
        eval_steps=between,
        seed=options.seed,
        save_strategy="steps",
        save_steps=between,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="epoch",
        **study.training.get(name, {}),
    )
    trainer = SparseTrainer(
        args=args,
        recipe=Recipe.load(RECIPES / file, args={"epochs": epochs, **recipe_args}) if file else None,
        teacher="self" if file else None,
        optimizer_cls_and_kwargs=study.optimizer,
        callbacks=[points],
        **parts,
    )
    points.trainer = trainer
    checkpoint = last_checkpoint(checkpoints)
    if checkpoint:
        points.resume(checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    if points.result["points"][-1]["epoch"] < epochs:
        trainer.evaluate()
    if study.tuned and name == "dense":
        with replacing(weights) as temporary:
            torch.save(trainer.model.state_dict(), temporary)
    result["finished"] = True
    write_json(path, result)
    shutil.rmtree(checkpoints, ignore_errors=True)


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower())


# Results


def gather(folder: Path, study: Study) -> None:
    """Writes `results.md` and `results.png` of the runs that are there."""
    runs = [json.loads(path.read_text()) for name in study.runs if (path := folder / f"{slug(name)}.json").exists()]
    runs = [run for run in runs if run["points"]]
    rows = []
    for run in runs:
        last = run["points"][-1]
        rows.append([
            run["run"] + ("" if run["finished"] else f" (stopped at epoch {last['epoch']:g})"),
            f"{last['sparsity']:.1%}", f"{last['accuracy']:.2%}",
            f"{last['native']}", f"{last['cpu_seconds']:.0f}", f"{last['peak_mib']}",
        ])  # fmt: skip
    headers = ["run", "zeros in pruned layers", "accuracy at the end", "native layers", "CPU s", "peak MiB"]
    with replacing(folder / "results.md") as temporary:
        temporary.write_text(markdown_table(headers, rows), encoding="utf-8")
    plot(runs, folder / "results.png")
    print((folder / "results.md").read_text())


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over the processor time spent on training, and sparsity over epochs."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run in runs:
        points = run["points"]
        left.plot(
            [p["cpu_seconds"] for p in points], [100 * p["accuracy"] for p in points], marker="o", label=run["run"]
        )
        right.plot([p["epoch"] for p in points], [100 * p["sparsity"] for p in points], marker="o")
    left.set(xlabel="CPU seconds of training", ylabel="accuracy, %")
    right.set(xlabel="epoch", ylabel="zeros in pruned layers, %", ylim=(-2, 102))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130)


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--study", choices=STUDIES, required=True)
    parser.add_argument("--runs", nargs="+", metavar="RUN", help="(default: all of the study)")
    parser.add_argument("--data", type=Path, default=DATA, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="folder for results; a finished run is kept")
    parser.add_argument("--epochs", type=int, help="instead of the study's own")
    parser.add_argument("--threads", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    study, folder = STUDIES[options.study], options.output / options.study
    names = options.runs or list(study.runs)
    if unknown := [name for name in names if name not in study.runs]:
        sys.exit(f"{options.study} has no run {unknown[0]!r}; its runs are {', '.join(study.runs)}")
    if options.in_process:
        torch.set_num_threads(options.threads)
        run_one(study, names[0], options)
        return
    for name in names:
        path = folder / f"{slug(name)}.json"
        if path.exists() and json.loads(path.read_text())["finished"]:
            continue
        shared = [f"--{key}={getattr(options, key)}" for key in ("study", "data", "output", "threads", "seed")]
        shared += [f"--epochs={options.epochs}"] if options.epochs else []
        subprocess.run([sys.executable, __file__, *shared, "--runs", name, "--in-process"], check=True)
    gather(folder, study)


if __name__ == "__main__":
    main()
