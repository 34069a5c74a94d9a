#!/usr/bin/env python
"""Trains a network on CIFAR-10, dense and under SWAT, on the same batches: accuracy at equal epochs.

    python scripts/swat_accuracy.py --output out/swat [--start resnet18] [--runs dense 80 erk-90] [--epochs 12]

--start says which network, and whether from random weights: resnet20 (He et al. 2016, 0.27 M weights), pretrained
(the same, trained on all 50,000 images) or resnet18 (of timm, 11 M weights). Each run leaves RUN.json in OUTPUT, with
a point for every epoch; one that is finished is not repeated.
"""

import argparse
import json
import os
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from measure_recipes import resnet20_for_cifar
from real_data import write_json
from torch import Tensor, nn
from train_bundled_resnet20 import Split, augment, batches, load_splits, normalise

from sparse_ft import SparseSession

SWAT = Path(__file__).parents[1] / "recipes/swat.yaml"
DENSE = """
epochs: 1
lr: 1
training_modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: eval(epochs)}
  - !LearningRateFunctionModifier
    {lr_func: cosine, init_lr: eval(lr), final_lr: 0.0, start_epoch: 0, end_epoch: eval(epochs)}
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("SPARSE_FT_SHARED", "../shared"))
    parser.add_argument("--data", type=Path, default=shared / "data")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--start", choices=("resnet20", "pretrained", "resnet18"), default="resnet20")
    parser.add_argument("--runs", nargs="+", default=["dense", "70", "80", "90"], help="dense, or zeros: 80, erk-90")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--dense-epochs", type=float, default=0.0, help="after which SWAT begins")
    parser.add_argument("--activation-sparsity", type=float, help="instead of that of the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def load_model(start: str, data: Path) -> nn.Module:
    if start == "resnet18":
        return timm.create_model("resnet18", num_classes=10)
    return resnet20_for_cifar(data, pretrained=start == "pretrained")


def train(args: argparse.Namespace, run: str, splits: dict[str, Split]) -> None:
    path = args.output / f"{run}.json"
    if path.exists() and json.loads(path.read_text())["finished"]:
        return
    torch.manual_seed(args.seed)
    model = load_model(args.start, args.data)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    recipe_args = {"epochs": args.epochs, "lr": args.lr}
    if run == "dense":
        model.to(memory_format=torch.channels_last)
    else:
        scope, _, percent = run.rpartition("-")
        recipe_args |= {"sparsity": int(percent) / 100, "scope": scope or "uniform", "start": args.dense_epochs}
    recipe = DENSE if run == "dense" else SWAT.read_text()
    if args.activation_sparsity is not None:
        recipe = recipe.replace("    scope:", f"    activation_sparsity: {args.activation_sparsity}\n    scope:")
    steps = len(splits["train"][1]) // args.batch_size
    session = SparseSession(model, recipe, optimizer, steps, recipe_args=recipe_args)
    settings = {
        key: getattr(args, key) for key in ("start", "batch_size", "weight_decay", "activation_sparsity", "seed")
    }
    result = {"run": run, "recipe_args": recipe_args} | settings
    result |= {"finished": False, "points": []}
    spent = 0.0
    for epoch in range(1, args.epochs + 1):
        began = time.process_time()
        for images, labels in batches(splits["train"], args.batch_size):
            loss = F.cross_entropy(model(normalise(augment(images))), labels)
            loss.backward()
            session.before_step()
            optimizer.step()
            session.after_step()
            optimizer.zero_grad()
        spent += time.process_time() - began
        point = {
            "epoch": epoch,
            "loss": loss.item(),
            "accuracy": accuracy(model, splits["test"]),
            "cpu_s": round(spent),
        }
        result["points"].append(point)
        result["finished"] = epoch == args.epochs
        result["sparsity"] = session.sparsity().overall
        write_json(path, result)
        print(run, json.dumps(point), flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, split: tuple[Tensor, Tensor]) -> float:
    model.eval()
    parts = zip(split[0].split(250), split[1].split(250), strict=True)
    correct = sum(int((model(normalise(images)).argmax(1) == labels).sum()) for images, labels in parts)
    model.train()
    return correct / len(split[1])


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    splits, _ = load_splits(str(args.data / "cifar10"))
    for run in args.runs:
        train(args, run, splits)


if __name__ == "__main__":
    main()
