#!/usr/bin/env python
"""Pack a trained timm checkpoint folder into the compact form in which models are bundled with the package.

    python scripts/pack_bundled.py TRAINED_FOLDER sparse_ft/bundled/resnet20_cifar10

writes config.json, sparse/model.safetensors and sparse_ft.json, and checks that the packed weights are bit for bit
those of the folder. README.md is written by hand.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from sparse_ft.hub import ModelError, compact, load_model, timm_models
from sparse_ft.hub.save import INFO_FILE, info_text, json_text
from sparse_ft.hub.staging import staged
from sparse_ft.masks import mask_state, sparsity

# Of pretrained_cfg, what this checkpoint's own training decided. The rest describes the weights that timm has for the
# architecture of the same name.
OWN_SETTINGS = (
    "input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "mean",
    "std",
    "num_classes",
    "first_conv",
    "classifier",
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="timm folder: config.json and model.safetensors")
    parser.add_argument("output", type=Path, help="folder to write")
    return parser.parse_args()


def pack(folder: Path, output: Path) -> None:
    model = load_model(folder)
    if not timm_models.is_timm_model(model):
        raise ModelError(f"{folder} is not a timm checkpoint")
    state_dict, masks, report = model.state_dict(), mask_state(model), sparsity(model)
    config = timm_models.config_dict(model, model.pretrained_cfg)
    config["pretrained_cfg"] = {name: config["pretrained_cfg"][name] for name in OWN_SETTINGS}
    training = folder / "train_results.json"
    extra = {"training": json.loads(training.read_text())} if training.is_file() else {}
    with staged(output) as stage:
        weights = stage / compact.COMPACT_FILE
        weights.parent.mkdir()
        tensors, entries = compact.pack((name, tensor, masks.get(name)) for name, tensor in state_dict.items())
        save_file(tensors, weights, compact.metadata(entries))
        restored, _ = compact.unpack(weights)
        if not _equal(restored, state_dict):
            raise ModelError(f"{folder}: the packed weights differ from the folder's")
        (stage / "config.json").write_text(json_text(config), encoding="utf-8")
        info = info_text(report, "timm", config["architecture"], metrics={}, extra=extra)
        (stage / INFO_FILE).write_text(info, encoding="utf-8")
        size = weights.stat().st_size
    print(f"{output}: {size:,} bytes of weights, {report.overall_pruned:.2%} zeros in the pruned layers")


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def main() -> None:
    args = parse_args()
    try:
        pack(args.folder, args.output)
    except (ModelError, OSError) as error:
        sys.exit(f"pack_bundled: {error}")


if __name__ == "__main__":
    main()
