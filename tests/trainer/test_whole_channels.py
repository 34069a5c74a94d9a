"""Recipes for whole channels and for learned masks in SparseTrainer: resumed exactly, and smaller at the end."""

import pytest
import timm
import torch
from test_resume import SGD, assert_same_run
from tiny import Images, make_trainer, resnet, timm_resnet

from sparse_ft import sparsity
from sparse_ft.channels import channels_removed, restore_channels

EPOCHS = 4  # of four steps
FBPS = "  - !FBPSModifier {final_sparsity: 0.5, end_epoch: 2.5, candidates: 3, candidate_batches: 2}"
RECIPES = {
    "fbps": FBPS,
    "fbps-both": FBPS.replace("end_epoch", "backward: both, end_epoch"),
    "probmask": "  - !ProbMaskModifier {params: ['re:.*conv.*weight'], final_sparsity: 0.5, end_epoch: 2.5}",
    "structured": "  - !StructuredPruningModifier {params: ['re:.*conv1.weight'], init_sparsity: 0.2, "
    "final_sparsity: 0.5, start_epoch: 0, end_epoch: 2.5, update_frequency: 1}",
}


def recipe(name):
    return f"modifiers:\n  - !EpochRangeModifier {{start_epoch: 0, end_epoch: {EPOCHS}}}\n{RECIPES[name]}\n"


@pytest.mark.parametrize("name", RECIPES)
def test_resume_is_exact(tmp_path, name):
    arguments = SGD | {"save_strategy": "steps", "save_steps": 3, "recipe": recipe(name), "num_train_epochs": EPOCHS}
    whole = make_trainer(timm_resnet(), tmp_path, **arguments)
    whole.train()
    assert sparsity(whole.model).overall > 0.2
    for step in (6, 12):
        resumed = make_trainer(timm_resnet(seed=1), tmp_path / "again", **arguments)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(resumed, whole)


@pytest.mark.parametrize("name", ["fbps", "structured"])
def test_dead_channels_are_removed(tmp_path, name):
    trainer = make_trainer(timm_resnet(), tmp_path, recipe=recipe(name), remove_channels=True, num_train_epochs=None)
    trainer.train()
    model = trainer.model
    assert channels_removed(model)
    report = trainer.removal_report
    assert sum(p.numel() for p in model.parameters()) == report.parameters_after < 0.9 * report.parameters_before
    images = torch.stack([each["pixel_values"] for each in Images()])
    expected = model.eval()(images)
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    assert channels_removed(model), "saving changes nothing"
    stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(stock(images), expected, rtol=1e-4, atol=1e-5)
    restore_channels(model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated, rel=1e-4)


def test_a_transformers_model(tmp_path):
    """Its loss comes from the model, its inputs by name."""
    trainer = make_trainer(resnet(), tmp_path, recipe=recipe("fbps"), remove_channels=True, num_train_epochs=None)
    trainer.train()
    assert trainer.removal_report.parameters_after < 0.7 * trainer.removal_report.parameters_before


def test_gradients_accumulate(tmp_path):
    trainer = make_trainer(
        timm_resnet(), tmp_path, recipe=recipe("fbps"), num_train_epochs=None,
        per_device_train_batch_size=3, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.session.settled and sparsity(trainer.model).overall > 0.3
