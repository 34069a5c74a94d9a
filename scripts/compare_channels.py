#!/usr/bin/env python
"""Trains a ResNet-20 dense, with FBPS and with channels pruned by magnitude; ProbMask and pruned weights beside it.

From random weights it is the network of scripts/train_bundled_resnet20.py, and all channels may go. From pretrained
ones (`--start pretrained`) it is that of He et al. for 32-pixel images, and channels inside the blocks may go. Same
data, steps, optimizer and learning rates for all; the results (accuracy on the test images, seconds, parameters and
operations of the network that is left) are written after every run.

    python scripts/compare_channels.py --output out/channels.json --epochs 20 --keep 0.7 0.5 0.3
    python scripts/compare_channels.py --output out/tuned.json --start pretrained --lr 0.02 --prune-until 0.6
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from command_line import DATA, make_parser
from measure_recipes import load_cifar
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from train_bundled_resnet20 import (
    ARCHITECTURE,
    MODEL_ARGS,
    Split,
    accuracy,
    augment,
    batches,
    enlarge,
    load_splits,
    normalise,
)

from sparse_ft import SparseSession, remove_channels
from sparse_ft.atomic import replacing

# Layers whose outputs are added lose the same filters.
STREAMS = [[f"re:layer{stage}\\.\\d\\.conv2", f"layer{stage}.0.downsample.0"] for stage in (1, 2, 3)]
FILTERS = {"random": ["re:(layer\\d.*)?conv", "re:.*downsample.0"], "pretrained": ["re:layer.*conv1"]}
WHOLE = {"random": ["conv1", "fc"], "pretrained": ["conv1", "linear"]}  # layers whose weights all stay

METHODS = ("dense", "fbps-one", "fbps-both", "magnitude", "weights", "probmask-1", "probmask-2")

TRAINING = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: eval(epochs)}
  - !LearningRateFunctionModifier
    {lr_func: cosine, init_lr: eval(lr), final_lr: 0.0, start_epoch: 0, end_epoch: eval(epochs)}
"""

MAGNITUDE = """  - !StructuredPruningModifier
    {params: eval(filters), param_groups: eval(streams), init_sparsity: 0.05, final_sparsity: eval(sparsity),
    start_epoch: eval(epochs * 0.2), end_epoch: eval(epochs * 0.6), update_frequency: 0.5}
"""

FBPS = """  - !FBPSModifier
    {params: eval(filters), final_sparsity: eval(sparsity), end_epoch: eval(epochs * search),
    learning_rate: eval(rate), backward: eval(backward), init: eval(init), prune_until: eval(prune_until)}
"""

PROBMASK = """  - !ProbMaskModifier
    {params: __ALL_PRUNABLE__, ignore: eval(dense), final_sparsity: eval(sparsity), end_epoch: eval(epochs * search),
    learning_rate: eval(rate), samples: eval(samples)}
"""

WEIGHTS = """  - !GMPruningModifier
    {params: __ALL_PRUNABLE__, ignore: eval(dense), init_sparsity: 0.05, final_sparsity: eval(sparsity), scope: global,
    start_epoch: eval(epochs * 0.2), end_epoch: eval(epochs * 0.6), update_frequency: 0.5}
"""


def recipes(args: argparse.Namespace) -> dict[str, str]:
    variables = {
        "epochs": args.epochs, "lr": args.lr, "rate": args.probability_lr, "init": args.init, "search": args.search,
        "prune_until": args.prune_until, "filters": FILTERS[args.start], "dense": WHOLE[args.start],
        "streams": STREAMS if args.start == "random" else None,
    }  # fmt: skip
    found = {}
    if "dense" in args.methods:
        found["dense"] = _recipe(TRAINING, variables)
    for keep in args.keep:
        here = variables | {"sparsity": round(1 - keep, 4)}
        if "magnitude" in args.methods:
            found[f"magnitude {keep:g}"] = _recipe(TRAINING + MAGNITUDE, here)
        for backward in ("one", "both"):
            if f"fbps-{backward}" in args.methods:
                found[f"FBPS {backward} {keep:g}"] = _recipe(TRAINING + FBPS, here | {"backward": backward})
        if "weights" in args.methods:
            found[f"weights by magnitude {keep:g}"] = _recipe(TRAINING + WEIGHTS, here)
        for samples in (1, 2):
            if f"probmask-{samples}" in args.methods:
                found[f"ProbMask {samples} {keep:g}"] = _recipe(TRAINING + PROBMASK, here | {"samples": samples})
    return found


def _recipe(text: str, variables: dict[str, Any]) -> str:
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in variables.items()) + text


def make(start: str) -> nn.Module:
    """The network that a run begins with."""
    if start == "random":
        return timm.create_model(ARCHITECTURE, num_classes=10, **MODEL_ARGS)
    return load_cifar(DATA, 0)["model"]


def run(recipe: str, data: dict[str, Split], args: argparse.Namespace, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = make(args.start).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    steps = len(data["train"][0]) // args.batch_size

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(enlarge(normalise(images), args.pixels)), labels)

    def sample(count: int, seed: int, batch_size: int | None):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            chosen = torch.randint(len(data["train"][0]), (batch_size or args.batch_size,), generator=generator)
            yield loss_of(data["train"][0][chosen], data["train"][1][chosen])

    session = SparseSession(model, recipe, optimizer, steps, grad_sampler=sample)
    begun, losses = time.perf_counter(), []
    for epoch in range(session.max_epochs):
        for images, labels in batches(data["train"], args.batch_size):
            images = augment(images)
            loss = loss_of(images, labels)
            losses.append(loss.item())
            if session.changes_loss:
                loss = session.loss(loss, None, images, again=lambda i=images, t=labels: loss_of(i, t))
            optimizer.zero_grad()
            loss.backward()
            session.before_step()
            optimizer.step()
            session.after_step()
        print(f"  epoch {epoch + 1}: loss {sum(losses[-steps:]) / steps:.3f}", flush=True)
    seconds = time.perf_counter() - begun
    session.finalize()
    masked = accuracy(model, data["test"], args.pixels)
    example = enlarge(normalise(data["test"][0][:8]), args.pixels)
    dense_operations = operations(model, example)
    report = remove_channels(model, example)
    left = operations(model, example)
    return {
        "accuracy": accuracy(model, data["test"], args.pixels),
        "accuracy_masked": masked,
        "seconds": round(seconds, 1),
        "parameters": report.parameters_after,
        "of_dense_parameters": round(report.parameters_after / report.parameters_before, 4),
        "of_dense_operations": round(left / dense_operations, 4),
        "loss": round(sum(losses[-steps:]) / steps, 4),
        "widths": {name: layer.out_channels for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)},
    }


def operations(model: nn.Module, images: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(images)
    return counter.get_total_flops()


def shown(args: argparse.Namespace) -> dict[str, Any]:
    names = ("start", "lr", "probability_lr", "search", "prune_until", "init", "pixels", "images")
    return {name: getattr(args, name) for name in names}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", default=str(DATA / "cifar10"), help="folder with train and test.parquet")
    parser.add_argument("--output", type=Path, required=True, help="results, as JSON")
    parser.add_argument("--methods", nargs="+", default=["dense", "fbps-one", "magnitude"],
                        choices=METHODS)  # fmt: skip
    parser.add_argument("--start", choices=FILTERS, default="random", help="weights that the training begins with")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.7, 0.5, 0.3],
                        help="share of channels (weights: of weights) that stays")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--search", type=float, default=0.8, help="share of the epochs that FBPS and ProbMask draw in")
    parser.add_argument("--prune-until", type=float, default=0.0, help="FBPSModifier's, of its time")
    parser.add_argument("--init", choices=("constant", "magnitude"), default="constant", help="FBPSModifier's")
    parser.add_argument("--pixels", type=int, help="side of the images that the network sees (64; pretrained: 32)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--probability-lr", type=float, default=12e-3)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--images", type=int, help="train on so many images only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    args.pixels = args.pixels or (64 if args.start == "random" else 32)
    data, _ = load_splits(args.data)
    data["train"] = (data["train"][0][: args.images], data["train"][1][: args.images])
    results: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    for seed in args.seeds:
        for name, recipe in recipes(args).items():
            key = f"{name}, seed {seed}"
            if key in results:
                continue
            print(key, flush=True)
            results[key] = run(recipe, data, args, seed) | {"epochs": args.epochs, "options": shown(args)}
            print(f"  {results[key]}", flush=True)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            with replacing(args.output) as temporary:
                temporary.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
