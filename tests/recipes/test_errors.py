"""An error names the recipe, line, modifier, field and value, and says what would be right."""

import pytest

from sparse_ft.recipes import Recipe, RecipeError

PRUNING = {
    "params": "[fc1.weight]",
    "init_sparsity": "0.05",
    "final_sparsity": "0.8",
    "start_epoch": "1",
    "end_epoch": "3",
    "update_frequency": "0.5",
}


def recipe(modifier="GMPruningModifier", **fields):
    lines = [f"    {name}: {value}" for name, value in fields.items() if value is not None]
    return "\n".join(["# a comment", "modifiers:", f"  - !{modifier}", *lines]) + "\n"


def pruning(**changes):
    return recipe(**(PRUNING | changes))


def message(text, **options):
    with pytest.raises(RecipeError) as caught:
        Recipe.load(text, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"final_sparsity": "1.5"},
            "recipe text, line 6: GMPruningModifier.final_sparsity: must be a number at least 0 and below 1, or a"
            " mapping from sparsities to lists of names (fraction of zeros), not 1.5",
        ),
        ({"final_sparsity": "high"}, "line 6: GMPruningModifier.final_sparsity: must be a number"),
        ({"final_sparsity": ".nan"}, "not nan"),
        ({"final_sparsity": None}, "line 3: GMPruningModifier.final_sparsity: is missing; it must be a number"),
        ({"final_sparcity": "0.5"}, "line 10: GMPruningModifier.final_sparcity: unknown field; did you mean"),
        ({"end_epoch": "0.5"}, "line 8: GMPruningModifier.end_epoch: must not be before start_epoch (1), is 0.5"),
        ({"end_epoch": "-1"}, "end_epoch: must be an epoch after start_epoch (1), not -1"),
        ({"start_epoch": "-3"}, "start_epoch: must be an epoch of at least 0, or -1 (epochs), not -3"),
        ({"params": "fc1.weight"}, "params: must be __ALL_PRUNABLE__, __ALL__ or a list of names"),
        ({"params": "[]"}, "params: must name at least one weight"),
        ({"params": "['re:(a']"}, "'(a' is not a regular expression"),
        ({"inter_func": "cubbic"}, "must be one of linear, cubic, inverse_cubic, not 'cubbic'; did you mean 'cubic'?"),
        ({"mask_type": "'2:4'"}, "init_sparsity: must be 0.5, which mask_type '2:4' fixes, not 0.05"),
        ({"mask_type": "filter"}, "whole filters and channels are pruned by StructuredPruningModifier"),
        ({"leave_enabled": "maybe"}, "leave_enabled: must be true or false, not 'maybe'"),
        ({"phased": "true"}, "phased pruning is retired"),
        ({"init_sparsity": "eval(start)"}, "line 5: GMPruningModifier.init_sparsity: no variable 'start'"),
    ],
)
def test_fields(changes, expected):
    assert expected in message(pruning(**changes))


@pytest.mark.parametrize(
    ("modifier", "fields", "expected"),
    [
        ("GMPruningModifer", PRUNING, "unknown modifier 'GMPruningModifer'; did you mean GMPruningModifier"),
        ("EpochRangeModifier", {}, "line 3: !EpochRangeModifier needs fields" ),
        ("LearningRateFunctionModifier",
         {"lr_func": "cyclic", "init_lr": 0.1, "final_lr": 0, "start_epoch": 0, "end_epoch": 2},
         "lr_func: must be one of linear, cosine, cyclic_linear, not 'cyclic'; did you mean 'cyclic_linear'?"),
        ("LearningRateModifier",
         {"lr_class": "MultiStepLR", "lr_kwargs": "{milestones: [3], gama: 1}", "init_lr": 0.1, "start_epoch": 0},
         "lr_kwargs: of MultiStepLR: gama unknown field; did you mean 'gamma'?"),
        ("LearningRateModifier",
         {"lr_class": "MultiStepLR", "lr_kwargs": "{milestones: [9]}", "init_lr": 1, "start_epoch": 0, "end_epoch": 8},
         "lr_kwargs: milestone 9 is not between start_epoch and end_epoch"),
        ("SetWeightDecayModifier", {"weight_decay": -1}, "weight_decay: must be a number at least 0, not -1"),
        ("ACDCPruningModifier", {}, "is missing"),
    ],
)  # fmt: skip
def test_modifiers(modifier, fields, expected):
    text = recipe(modifier, **fields)
    if modifier == "EpochRangeModifier":
        text = text.replace("!EpochRangeModifier", "!EpochRangeModifier 5")
    assert expected in message(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: 2\n", 'has no modifiers: neither a list under a key with "modifiers" in its name'),
        ("modifiers: []\n\n", "has no modifiers"),
        ("modifiers:\n  GMPruningModifier:\n    a: 1\n", "in this dialect modifiers are a list: - !GMPruningModifier"),
        ("modifiers:\n  - GMPruningModifier\n", "must hold modifiers such as - !GMPruningModifier"),
        ("others:\n  - !EpochRangeModifier {start_epoch: 0, end_epoch: 1}\nmodifiers: []\n", "the tag"),
        ("a: 1\na: 2\nmodifiers: []\n", "line 2: 'a' is there twice, first in line 1"),
        ("modifiers: [\n\n", "is not YAML"),
        ("- a\n- b\n", "is not a mapping"),
        (
            "a: eval(b)\nb: eval(a)\n" + recipe("SetLearningRateModifier", learning_rate="eval(a)"),
            "depend on themselves",
        ),
        ("\n\n", "is empty"),
        ("a_stage:\n  run_type: sometimes\n  x_modifiers: {}\n", "run_type must be train or oneshot"),
    ],
)
def test_documents(text, expected):
    assert expected in message(text)


def test_unknown_may_be_passed_over(caplog):
    text = pruning(final_sparcity="0.5") + "  - !FooModifier\n    bar: 1\n"
    loaded = Recipe.load(text, ignore_unknown=True)
    (modifier,) = loaded.modifiers
    assert modifier.final_sparsity == 0.8
    assert "final_sparcity" in caplog.text
    assert "FooModifier" in caplog.text
    assert "FooModifier" in loaded.dump()


def test_a_wrong_value_is_an_error_even_then():
    with pytest.raises(RecipeError, match="must be a number"):
        Recipe.load(pruning(final_sparsity="x"), ignore_unknown=True)


def test_what_nothing_ever_read_is_dropped(caplog):
    Recipe.load(pruning(log_types="__ALL__"))
    assert "log_types has no effect" in caplog.text


def test_parts_of_an_error():
    with pytest.raises(RecipeError) as caught:
        Recipe.load(pruning(final_sparsity="1.5"))
    error = caught.value
    assert (error.recipe, error.line, error.modifier) == ("recipe text", 6, "GMPruningModifier")
    assert (error.field, error.value) == ("final_sparsity", 1.5)


def test_a_folder_without_a_recipe(tmp_path):
    with pytest.raises(RecipeError, match=r"is a folder without recipe\.yaml"):
        Recipe.load(tmp_path)
