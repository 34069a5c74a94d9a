"""The schedule of a recipe without a model."""

import pytest

from sparse_ft.recipes import Recipe
from sparse_ft.recipes.schedule import make_schedule

TEXT = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 5}
  - !SetLearningRateModifier {learning_rate: 0.5}
  - !GMPruningModifier
    {params: [a, b, c, d], init_sparsity: 0.2, final_sparsity: 0.8, start_epoch: 1, end_epoch: 3,
     update_frequency: 0.5, inter_func: linear}
  - !LearningRateFunctionModifier {lr_func: linear, init_lr: 0.4, final_lr: 0.0, start_epoch: 2, end_epoch: 4}
"""


def test_values_by_epoch():
    schedule = make_schedule(Recipe.load(TEXT), steps_per_epoch=10)
    rows = schedule.to_dict()["schedule"]
    assert [row.get("sparsity") for row in rows] == [None, [0.2], [pytest.approx(0.5)], [0.8], [0.8], [0.8]]
    assert [row["learning rate"][0] for row in rows] == pytest.approx([0.5, 0.5, 0.4, 0.2, 0.0, 0.0])
    assert [entry["updates"] for entry in schedule.to_dict()["modifiers"]] == [2, 1, 5, 21]
    text = str(schedule)
    assert "sparsity 20.0% to 80.0%" in text
    assert "a, b, c and 1 more" in text


def test_a_mask_that_is_let_go():
    text = TEXT.replace("inter_func: linear}", "inter_func: linear, leave_enabled: false}")
    rows = make_schedule(Recipe.load(text), 10).to_dict()["schedule"]
    assert [row.get("sparsity") for row in rows][3:] == [[0.8], None, None]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(tmp_path, suffix):
    path = tmp_path / f"schedule.{suffix}"
    make_schedule(Recipe.load(TEXT), 10).plot(path)
    assert path.stat().st_size > 1000
    assert list(tmp_path.iterdir()) == [path]


def test_every_real_recipe_has_one(compat_folder):
    for path in sorted((compat_folder / "recipes" / "legacy").iterdir()):
        if not path.name.endswith(("mobilenet-pruned_quant.md", "mfac-short-95.md")):
            recipe = Recipe.load(path)
            assert len(str(make_schedule(recipe, 10)).splitlines()) >= len(recipe.modifiers) + 2
