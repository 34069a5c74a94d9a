#!/usr/bin/env python
"""Train the bundled sparse ResNet-20 for CIFAR-10: dense, then gradual magnitude pruning, then recovery.

The network is one that stock timm builds: `resnet18` with three stages of three blocks and 16, 32 and 64 channels.
timm's stem reduces the image fourfold. Enlarged to 128 pixels, the images give the stages the 32-, 16- and 8-pixel
maps of the CIFAR ResNet-20 (He et al. 2016); 64 pixels, the default, cost a quarter of it. The pruning schedule is
the cubic one of Zhu and Gupta 2017 (arXiv 1710.01878).
"""

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from command_line import DATA, make_parser
from timm.models import save_for_hf
from torch import Tensor, nn
from tqdm import tqdm

from sparse_ft.masks import mask_state, prune, sparsity

ARCHITECTURE = "resnet18"
MODEL_ARGS = {"layers": (3, 3, 3, 0), "channels": (16, 32, 64, 64)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATA_PIXELS, PADDING = 32, 4
Split = tuple[Tensor, Tensor]  # images uint8 (N, 3, 32, 32), labels int64 (N,)


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument(
        "--data",
        default=str(DATA / "cifar10"),
        help="folder with train.parquet and test.parquet, or a dataset id (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write, which must not exist yet")
    parser.add_argument("--epochs", type=int, default=60, help="in all phases together (default: %(default)s)")
    parser.add_argument("--dense", type=float, default=0.35, help="share of the epochs before pruning")
    parser.add_argument("--pruning", type=float, default=0.35, help="share of the epochs in which sparsity rises")
    parser.add_argument("--sparsity", type=float, default=0.93, help="of the pruned convolutions")
    parser.add_argument("--scope", choices=("uniform", "erk", "global"), default="uniform")
    parser.add_argument("--updates-per-epoch", type=int, default=2, help="mask updates while sparsity rises")
    parser.add_argument("--pixels", type=int, default=64, help="side of the images that the network sees")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate of the dense phase")
    parser.add_argument("--sparse-lr", type=float, default=0.05, help="peak learning rate from pruning on")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the activations in training")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_splits(source: str) -> tuple[dict[str, Split], list[str]]:
    """The train and test split, and the names of the labels."""
    import datasets

    if (Path(source) / "train.parquet").is_file():
        files = {split: str(Path(source) / f"{split}.parquet") for split in ("train", "test")}
        loaded = datasets.load_dataset("parquet", data_files=files)
    else:
        loaded = datasets.load_dataset(source)
    splits = {}
    for split in ("train", "test"):
        column = "image" if "image" in loaded[split].column_names else "img"
        images = np.stack([np.asarray(image.convert("RGB")) for image in loaded[split][column]])
        splits[split] = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(loaded[split]["label"])
    return splits, loaded["train"].features["label"].names


def augment(images: Tensor) -> Tensor:
    """A random crop out of the zero-padded image, mirrored or not, each image its own."""
    count, _, side, _ = images.shape
    padded = F.pad(images, (PADDING,) * 4)
    rows = torch.randint(2 * PADDING + 1, (count, 1)) + torch.arange(side)
    columns = torch.randint(2 * PADDING + 1, (count, 1)) + torch.arange(side)
    mirrored = torch.rand(count, 1) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # N, H, W, C
    return picked.permute(0, 3, 1, 2)


def normalise(images: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def enlarge(images: Tensor, pixels: int) -> Tensor:
    large = F.interpolate(images, size=(pixels, pixels), mode="bilinear", align_corners=False)
    return large.contiguous(memory_format=torch.channels_last)


def batches(split: Split, size: int) -> Iterator[Split]:
    images, labels = split
    order = torch.randperm(len(images))
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield images[chosen], labels[chosen]


@torch.inference_mode()
def accuracy(model: nn.Module, split: Split, pixels: int) -> float:
    model.eval()
    correct = 0
    for images, labels in zip(split[0].split(250), split[1].split(250), strict=True):
        correct += int((model(enlarge(normalise(images), pixels)).argmax(1) == labels).sum())
    model.train()
    return correct / len(split[1])


class Masks:
    """Keeps pruned weights at zero: their gradients and their momentum are zero, so no step moves them."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.masks: dict[nn.Parameter, Tensor] = {}

    def prune_to(self, target: float, scope: str) -> None:
        prune(self.model, target, scope=scope)
        self.masks = {self.model.get_parameter(name): mask for name, mask in mask_state(self.model).items()}
        for weight, mask in self.masks.items():
            momentum = self.optimizer.state[weight].get("momentum_buffer")
            if momentum is not None:
                momentum.mul_(mask)

    def apply_to_gradients(self) -> None:
        for weight, mask in self.masks.items():
            weight.grad.mul_(mask)


def cosine(progress: float, peak: float, warmup: float = 0.05) -> float:
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def train(model: nn.Module, data: dict[str, Split], args: argparse.Namespace) -> dict:
    steps_per_epoch = len(data["train"][0]) // args.batch_size
    steps = args.epochs * steps_per_epoch
    prune_start, prune_end = round(args.dense * steps), round((args.dense + args.pruning) * steps)
    update_every = max(1, steps_per_epoch // args.updates_per_epoch)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=args.weight_decay, nesterov=True)
    masks = Masks(model, optimizer)
    results: dict = {}
    step = 0
    for epoch in range(args.epochs):
        bar = tqdm(
            batches(data["train"], args.batch_size), f"epoch {epoch + 1}", steps_per_epoch, leave=False, disable=None
        )
        losses = []
        for images, labels in bar:
            if step == prune_start:
                results["dense_accuracy"] = accuracy(model, data["test"], args.pixels)
                print(f"dense: {results['dense_accuracy']:.2%} of the test images", flush=True)
            if prune_start <= step <= prune_end and ((step - prune_start) % update_every == 0 or step == prune_end):
                done = (step - prune_start) / (prune_end - prune_start)
                masks.prune_to(args.sparsity * (1 - (1 - done) ** 3), args.scope)
            if step < prune_start:
                lr = cosine(step / prune_start, args.lr)
            else:
                lr = cosine((step - prune_start) / (steps - prune_start), args.sparse_lr)
            optimizer.param_groups[0]["lr"] = lr

            small = normalise(augment(images))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.precision == "bf16"):
                logits = model(enlarge(small, args.pixels)).float()
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            masks.apply_to_gradients()
            optimizer.step()
            losses.append(loss.item())
            step += 1
        shown = f"epoch {epoch + 1:3d}  loss {np.mean(losses):.4f}  sparsity {sparsity(model).overall_pruned:.4f}"
        if (epoch + 1) % 5 == 0:
            shown += f"  test {accuracy(model, data['test'], args.pixels):.2%}"
        print(shown, flush=True)
    results["sparse_accuracy"] = accuracy(model, data["test"], args.pixels)
    results["sparsity_of_pruned_layers"] = sparsity(model).overall_pruned
    print(f"sparse: {results['sparse_accuracy']:.2%} of the test images", flush=True)
    return results


def save(model: nn.Module, label_names: list[str], results: dict, args: argparse.Namespace) -> None:
    model.pretrained_cfg |= {
        "input_size": (3, args.pixels, args.pixels),
        "mean": MEAN,
        "std": STD,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "num_classes": len(label_names),
        "label_names": label_names,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{args.output.name}-", dir=args.output.parent))
    try:
        stage.chmod(0o755)
        model = model.to(memory_format=torch.contiguous_format)
        save_for_hf(model, stage, {"label_names": label_names}, model_args=MODEL_ARGS, safe_serialization=True)
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        for name in ("data", "output"):  # file names, not the paths of this machine
            options[name] = options[name] and Path(options[name]).name
        (stage / "train_results.json").write_text(json.dumps(results | {"options": options}, indent=2) + "\n")
        stage.rename(args.output)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def main() -> None:
    args = parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists already; choose another --output")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data, label_names = load_splits(args.data)
    model = timm.create_model(ARCHITECTURE, num_classes=len(label_names), **MODEL_ARGS)
    model = model.to(memory_format=torch.channels_last)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data['train'][0]):,} training images")
    results = train(model, data, args)
    print(sparsity(model))
    save(model, label_names, results, args)


if __name__ == "__main__":
    main()
