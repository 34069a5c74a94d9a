"""Recipes measured on data: a run that is stopped goes on."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import measure_recipes
from measure_recipes import MOMENTUM, Points, Study, image_parts, run_one
from real_data import CifarResNet


def load(data, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (48, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(48) % 10
    torch.manual_seed(seed)
    return image_parts(CifarResNet(8, 10), (images[:32], labels[:32]), (images[32:], labels[32:]))


STUDY = Study(
    load, 3, 16, (torch.optim.SGD, {"lr": 0.05, **MOMENTUM}),
    {"frozen mask": ("one_shot.yaml", {"dense": ["conv1", "linear"], "lr": 0.05}), "dense": ("", {})},
    training={"frozen mask": {"max_grad_norm": 0.0}},
)  # fmt: skip


def measured(folder, name):
    run_one(STUDY, name, argparse.Namespace(study="tiny", data=None, output=folder, seed=0, epochs=None, threads=1))
    return json.loads((folder / f"tiny/{measure_recipes.slug(name)}.json").read_text())


@pytest.mark.parametrize("name", STUDY.runs)
def test_a_stopped_run_goes_on(name, tmp_path, monkeypatch):
    whole = measured(tmp_path / "whole", name)
    assert whole["finished"] and [point["epoch"] for point in whole["points"]] == [1, 2, 3]
    assert not list(tmp_path.glob("**/checkpoint-*"))

    save = Points.on_save

    def stop(self, args, state, control, **kwargs):
        save(self, args, state, control, **kwargs)
        if state.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Points, "on_save", stop)
        measured(tmp_path / "parts", name)
    resumed = measured(tmp_path / "parts", name)
    assert resumed["finished"] and [point["epoch"] for point in resumed["points"]] == [1, 2, 3]
    for point, other in zip(resumed["points"], whole["points"], strict=True):
        assert point["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert point["sparsity"] == other["sparsity"]
    spent = [point["cpu_seconds"] for point in resumed["points"]]
    assert spent == sorted(spent)
