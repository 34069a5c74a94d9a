"""Recipes in the hands of the real sparseml package, where it is installed."""

from importlib.util import find_spec

import pytest
import torch
from tiny import bert, make_trainer

from sparse_ft import RecipeError
from sparse_ft.checkpoint import CheckpointError
from sparse_ft.masks import mask_state

RECIPE = """
sparsity: 0.5
modifiers:
  - !EpochRangeModifier
    start_epoch: 0
    end_epoch: 4
  - !GMPruningModifier
    params: ["re:.*layer.*dense.weight"]
    init_sparsity: 0.2
    final_sparsity: eval(sparsity)
    start_epoch: 0
    end_epoch: 3
    update_frequency: 0.5
  - !LearningRateFunctionModifier
    lr_func: linear
    init_lr: 0.01
    final_lr: 0.0
    start_epoch: 0
    end_epoch: 4
"""
ARGUMENTS = {"num_train_epochs": None, "learning_rate": None, "recipe_args": "sparsity=0.8"}

installed = pytest.mark.skipif(find_spec("sparseml") is None, reason="sparseml is not installed")


@installed
def test_it_prunes_as_our_own_engine_does_in_its_manner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # sparseml writes logs where it runs
    compiles = torch.compile
    theirs = make_trainer(bert(), tmp_path / "theirs", recipe=RECIPE, recipe_engine="sparseml", **ARGUMENTS)
    theirs.train()
    assert torch.compile is compiles
    assert theirs.args.num_train_epochs == 4
    assert theirs.lr_scheduler.get_last_lr()[0] < 0.001
    ours = make_trainer(
        bert(), tmp_path / "ours", recipe=RECIPE, recipe_compat="sparseml", sparse_policy="none", **ARGUMENTS
    )
    ours.train()
    masks = mask_state(theirs.model)
    assert masks.keys() == ours.masks.keys()
    for name, mask in masks.items():
        assert int((~mask).sum()) == int((~ours.masks[name]).sum()) == round(0.8 * mask.numel())
        assert torch.equal(mask, ours.masks[name]), name
    for name, tensor in ours.model.state_dict().items():
        torch.testing.assert_close(theirs.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    theirs.save_model()
    assert "GMPruningModifier" in (tmp_path / "theirs" / "recipe.yaml").read_text()


@installed
def test_what_it_cannot_do(tmp_path):
    distil = RECIPE + "  - !DistillationModifier\n    hardness: 0.5\n"
    with pytest.raises(RecipeError, match="distils, which engine 'sparseml' does not"):
        make_trainer(bert(), tmp_path, recipe=distil, recipe_engine="sparseml")
    with pytest.raises(RecipeError, match="sparseml does not read it: "):
        make_trainer(bert(), tmp_path, recipe=RECIPE.replace("GMP", "GMB"), recipe_engine="sparseml")
    make_trainer(bert(), tmp_path, recipe=RECIPE, recipe_engine="sparseml", max_steps=2, save_strategy="epoch").train()
    again = make_trainer(bert(), tmp_path, recipe=RECIPE, recipe_engine="sparseml")
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        again.train(resume_from_checkpoint=True)


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_ft.sparseml_engine.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs the package: pip install 'sparse_ft\[sparseml\]'"):
        make_trainer(bert(), tmp_path, recipe=RECIPE, recipe_engine="sparseml")
    with pytest.raises(ValueError, match="engine must be"):
        make_trainer(bert(), tmp_path, recipe=RECIPE, trainer_options={"engine": "other"})
