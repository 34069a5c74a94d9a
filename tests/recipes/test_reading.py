"""Dialects, variables, front matter, overrides, and what is written back."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_ft.recipes import Recipe, RecipeError

FLAT = """
num_epochs: 10
rate: 1e-2
rates: [0.1, 0.2]
kind: 2:4

training_modifiers:
  - !EpochRangeModifier
    start_epoch: 0
    end_epoch: eval(num_epochs)
  - !SetLearningRateModifier
    learning_rate: eval(rate * 2)
"""

PRUNING = """
  - !GMPruningModifier
    params: [fc1.weight]
    init_sparsity: 0.05
    final_sparsity: 0.8
    start_epoch: 1
    end_epoch: 3
    update_frequency: 0.5
"""


def only(recipe):
    (modifier,) = recipe.modifiers
    return modifier


def with_field(line):
    return f"modifiers:\n  - !SetLearningRateModifier\n    {line}\n"


def test_variables_and_arithmetic():
    recipe = Recipe.load(FLAT)
    assert recipe.max_epochs == 10
    assert recipe.modifiers[1].learning_rate == pytest.approx(0.02)
    assert recipe.document.variables["kind"] == "2:4"


@pytest.mark.parametrize(
    "args",
    [
        {"num_epochs": 20, "rate": 0.5},
        '{"num_epochs": 20, "rate": 0.5}',
        "num_epochs=20, rate=0.5",
        "num_epochs:20,rate=5e-1",
    ],
)
def test_overrides(args):
    recipe = Recipe.load(FLAT, args=args)
    assert recipe.max_epochs == 20
    assert recipe.modifiers[1].learning_rate == 1.0
    assert Recipe.load(recipe.dump()).modifiers == recipe.modifiers


def test_an_override_may_be_an_expression():
    assert Recipe.load(FLAT, args="num_epochs=eval(max(3, 4) * 2)").max_epochs == 8


def test_an_override_of_nothing_is_an_error():
    with pytest.raises(RecipeError, match="has no variable 'epochs' to set; its variables are num_epochs, rate"):
        Recipe.load(FLAT, args="epochs=3")
    with pytest.raises(RecipeError, match="must be name=value"):
        Recipe.load(FLAT, args="twenty")
    with pytest.raises(RecipeError, match="are not JSON"):
        Recipe.load(FLAT, args="{oops")


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 * (3 + 4) - 6 / 3", 12.0),
        ("7 // 2 + 7 % 4 + 2 ** 3", 14),
        ("-min(1, 2) + max(3, 4) + abs(-2)", 5),
        ("round(2.567, 2)", 2.57),
        ("round(number=2.567, ndigits=1)", 2.6),
        ("int(3.9) + float(1)", 4.0),
        ("b", 6.0),
    ],
)
def test_expressions(expression, value):
    text = f"a: eval(b / 2)\nb: eval(c + 4)\nc: 2.0\n{with_field(f'learning_rate: eval({expression})')}"
    assert only(Recipe.load(text)).learning_rate == pytest.approx(value)


def test_a_variable_may_be_a_text_or_a_list():
    text = f"shape: [1, 4]\nwhich: __ALL_PRUNABLE__\nmodifiers:{PRUNING}    mask_type: eval(shape)\n"
    modifier = only(Recipe.load(text.replace("[fc1.weight]", "eval(which)")))
    assert modifier.mask_type == "block_1x4"
    assert modifier.params == "__ALL_PRUNABLE__"


def test_anchors_and_merges():
    text = """
lr: &lr 0.5
common: &common {start_epoch: 1.0, learning_rate: *lr}
modifiers:
  - !SetLearningRateModifier
    <<: *common
    start_epoch: 2.0
"""
    modifier = only(Recipe.load(text))
    assert (modifier.start_epoch, modifier.learning_rate) == (2.0, 0.5)


def test_stages_have_variables_of_their_own():
    text = """
rate: 0.1
first:
  rate: 0.2
  some_modifiers:
    - !SetLearningRateModifier
      learning_rate: eval(rate)
second:
  other_modifiers:
    - !pytorch.SetLearningRateModifier
      start_epoch: 5
      learning_rate: eval(rate)
"""
    recipe = Recipe.load(text)
    assert recipe.document.dialect == "staged"
    assert [modifier.learning_rate for modifier in recipe.modifiers] == [0.2, 0.1]
    assert Recipe.load(recipe.dump()) == recipe
    assert [m.learning_rate for m in Recipe.load(text, args="rate=0.3").modifiers] == [0.3, 0.3]
    assert Recipe.load(recipe.to_flat().dump()).modifiers == recipe.modifiers


def test_the_mapping_dialect():
    text = """
train_stage:
  run_type: train
  args: {last: 3}
  pruning_modifiers:
    MagnitudePruningModifier:
      targets: ["re:fc.*weight"]
      init_sparsity: 0.0
      final_sparsity: 0.5
      start: 0
      end: eval(last)
      update: 0.5
      update_scheduler: linear
      mask_structure: block_1,4
      scheduler_args: {}
    ConstantPruningModifier: {targets: __ALL__, start: 3}
"""
    recipe = Recipe.load(text)
    pruning, constant = recipe.modifiers
    assert (pruning.end_epoch, pruning.inter_func, pruning.mask_type) == (3.0, "linear", "block_1x4")
    assert constant.params == "__ALL__"
    assert Recipe.load(recipe.dump()) == recipe
    assert "GMPruning" not in recipe.to_flat().dump()
    assert "update_frequency: 0.5" in recipe.to_flat().dump()


def test_front_matter(tmp_path):
    body = with_field("learning_rate: 0.5").strip("\n")
    page = f"<!-- licence -->\n\n---\n# ---- a rule is no end\n{body}\n---\n# Title\n---\nmore\n"
    path = tmp_path / "recipe.md"
    path.write_text(page)
    assert only(Recipe.load(path)).learning_rate == 0.5
    assert only(Recipe.load(page)).learning_rate == 0.5
    path.write_text(page.replace("0.5", "x"))
    with pytest.raises(
        RecipeError, match=r"recipe.md, line 7: SetLearningRateModifier.learning_rate: must be a number"
    ):
        Recipe.load(path)
    path.write_text("# Title\n")
    with pytest.raises(RecipeError, match="no front matter"):
        Recipe.load(path)
    path.write_text(f"---\n{body}\n")
    with pytest.raises(RecipeError, match="no --- that ends it"):
        Recipe.load(path)


@pytest.mark.parametrize("name", ["r.yaml", "r.yml", "r.json"])
def test_files(tmp_path, name):
    path = tmp_path / name
    text = with_field("learning_rate: 0.5")
    if name.endswith("json"):
        text = json.dumps(
            {"a_stage": {"b_modifiers": {"SetLearningRateModifier": {"learning_rate": 0.5, "start": 1}}}}
        )
    path.write_text(text)
    assert only(Recipe.load(str(path))).learning_rate == 0.5


def test_a_folder_stands_for_its_recipe(tmp_path):
    recipe = Recipe.load(FLAT)
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path) == recipe


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("missing.yaml", "no such file"),
        ("zoo:cv/classification", "SparseZoo is closed"),
        ("modifiers: []", "a text needs more than one line"),
    ],
)
def test_what_is_no_source(source, problem):
    with pytest.raises(RecipeError, match=problem):
        Recipe.load(source)


def test_a_recipe_of_another_suffix(tmp_path):
    path = tmp_path / "recipe.txt"
    path.write_text(FLAT)
    with pytest.raises(RecipeError, match=r"a recipe is a .yaml, .yml, .md, .json file, not .txt"):
        Recipe.load(path)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.sampled_from(["1e-4", "null", "2:4", "yes", "0x10", "eval(a)", "- a", "a: b", "#", "re:.*[a-z]\\d+$", ""]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("abc01.- ", max_size=5), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text("abcdefg_0123456789", min_size=1, max_size=6), VALUES, max_size=5))
def test_what_is_written_reads_back_equal(variables):
    recipe = Recipe.load(FLAT)
    recipe.document.variables |= {f"v{name}": value for name, value in variables.items()}
    again = Recipe.load(recipe.dump())
    assert again == recipe
    assert again.dump() == recipe.dump()
