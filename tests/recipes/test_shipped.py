"""The recipes that ship: read, supported, with a schedule, and with weights in the models they are for."""

from pathlib import Path

import pytest
import timm
import torch
from transformers import BertConfig, BertForQuestionAnswering

from sparse_ft.recipes import Recipe
from sparse_ft.recipes.schedule import make_schedule

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
TRANSFORMERS = ("movement.yaml", "obert.yaml", "bert_base_squad_obert.yaml")


def test_the_index_has_them_all():
    page = (FOLDER / "README.md").read_text()
    for path in RECIPES:
        assert path.parent.name == "full_size" or f"`{path.name}`" in page


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe(path):
    recipe = Recipe.load(path)
    recipe.check_supported()
    assert Recipe.load(recipe.dump()) == recipe
    schedule = make_schedule(recipe, 20)
    assert schedule.epochs == recipe.max_epochs >= 5
    with torch.device("meta"):
        if path.name in TRANSFORMERS:
            model = BertForQuestionAnswering(BertConfig(num_hidden_layers=1))
        else:
            model = timm.create_model("resnet50" if path.parent.name == "full_size" else "resnet18")
    weights = recipe.check_names(model)
    assert len(weights) >= 6
    if path.name != "sparse_transfer.yaml":
        wanted = {recipe.document.variables.get("sparsity", 0.5)}
        assert {value for value in schedule.at(20 * recipe.max_epochs)["sparsity"]} == wanted


def test_acdc_of_full_size_has_the_published_phases():
    recipe = Recipe.load(FOLDER / "full_size" / "resnet50_imagenet_acdc90.yaml")
    sparse = [bool(sum(row.get("sparsity", []))) for row in make_schedule(recipe, 20).to_dict()["schedule"]]
    expected = [10 <= e < 75 and e % 10 < 5 and e % 10 >= 0 or e >= 85 for e in range(101)]
    assert sparse[:75] == expected[:75]
    assert sparse[76:85] == [False] * 9  # the mask stands for the step at 75 itself
    assert all(sparse[85:])
