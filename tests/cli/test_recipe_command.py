"""`sparse-ft recipe` and `sparse-ft train`."""

import json

import pytest
from test_commands import QUICK

from sparse_ft import Recipe, from_pretrained, sparsity

GMP = """
last: 2
modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: eval(last + 1)}
  - !GMPruningModifier
    {params: ['re:layer[234].*conv[123].weight'], init_sparsity: 0.2, final_sparsity: 0.75, start_epoch: 0,
     end_epoch: eval(last), update_frequency: 0.5}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "gmp.yaml"
    path.write_text(GMP)
    return path


def test_validate(run, recipe, image_model):
    status, out, _ = run("recipe", "validate", recipe)
    assert (status, out) == (0, f"{recipe}: fine; 2 modifiers, 3 epochs\n")
    status, out, _ = run("recipe", "validate", recipe, "--model", image_model, "--json", "--recipe-args", "last=4")
    assert status == 0
    facts = json.loads(out)
    assert (facts["epochs"], facts["dialect"]) == (5, "flat")
    assert facts["weights"] > 3


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ("0.75", "gmp.yaml, line 6: GMPruningModifier.final_sparsity: must be a number at least 0 and below 1"),
        (
            "layer[234]",
            "gmp.yaml, line 6: GMPruningModifier.params: 're:stage.*conv[123].weight' matches no parameter",
        ),
        ("!GMPruningModifier", "gmp.yaml, line 5: GMPruningModifer: unknown modifier"),
    ],
)
def test_validate_says_what_is_wrong(run, recipe, image_model, wrong, expected):
    better = {"0.75": "75", "layer[234]": "stage", "!GMPruningModifier": "!GMPruningModifer"}
    recipe.write_text(GMP.replace(wrong, better[wrong]))
    status, out, err = run("recipe", "validate", recipe, "--model", image_model)
    assert (status, out) == (1, "")
    assert expected in err
    assert len(err.splitlines()) == 1


def test_quantization_is_refused_unless_it_is_passed_over(run, recipe):
    recipe.write_text(GMP + "  - !QuantizationModifier {start_epoch: 1}\n")
    status, _, err = run("recipe", "validate", recipe)
    assert status == 1
    assert "line 8: QuantizationModifier: quantization is not supported here" in err
    assert run("recipe", "validate", recipe, "--ignore-unknown")[0] == 0


def test_show(run, recipe, tmp_path):
    status, out, _ = run("recipe", "show", recipe, "--plot", tmp_path / "schedule.svg")
    assert status == 0
    assert "sparsity 20.0% to 75.0%" in out
    assert (tmp_path / "schedule.svg").is_file()
    status, out, _ = run("recipe", "show", recipe, "--json")
    assert json.loads(out)["schedule"][3] == {"epoch": 3, "sparsity": [0.75]}


def test_convert(run, tmp_path):
    source, target = tmp_path / "new.yaml", tmp_path / "flat.yaml"
    source.write_text(
        "a_stage:\n  b_modifiers:\n    ConstantPruningModifier: {targets: __ALL__, start: eval(2 * 3)}\n"
    )
    status, out, _ = run("recipe", "convert", source)
    assert status == 0
    assert "- !ConstantPruningModifier\n      params: __ALL__\n      start_epoch: 6\n" in out
    assert run("recipe", "convert", source, "--output", target)[0] == 0
    assert target.read_text() == out
    assert Recipe.load(target).modifiers == Recipe.load(source).modifiers


def test_modifiers(run):
    assert "GMPruningModifier" in run("recipe", "modifiers")[1]
    assert "| `final_sparsity` |" in run("recipe", "modifiers", "--markdown")[1]
    assert len(json.loads(run("recipe", "modifiers", "--json")[1])["modifiers"]) > 10


@pytest.mark.parametrize("argv", [["show"], ["modifiers", "x.yaml"], ["draw", "x.yaml"], []])
def test_wrong_use(run, argv):
    assert run("recipe", *argv)[0] == 2


def test_train(run, recipe, image_model, tmp_path):
    arguments = ("--model", image_model, "--dataset", "digits", "--output-dir", tmp_path / "out", "--recipe", recipe)
    status, out, err = run(
        "train", *arguments, *QUICK, "--max-train-samples", 64, "--max-eval-samples", 32, "--no-compare"
    )
    assert status == 0, err
    assert "3 epochs, as the recipe says" in err
    assert "3 epochs" in out
    assert Recipe.load(tmp_path / "out") == Recipe.load(recipe)
    layers = {layer.name: layer for layer in sparsity(from_pretrained(tmp_path / "out", convert=False)).layers}
    assert layers["layer2.0.conv1"].sparsity == pytest.approx(0.75, abs=5e-3)  # of 0.8 before
    assert run("train", *arguments[:-2])[0] == 2


def test_weights_that_begin_at_random_are_those_of_the_seed(run, recipe, tmp_path):
    def weights(folder, *seed):
        status, _, err = run(
            "train", "--model", "timm/test_resnet", "--dataset", "digits", "--image-size", 32, "--recipe", recipe,
            "--output-dir", tmp_path / folder, "--max-train-samples", 16, "--max-eval-samples", 8, "--no-compare",
            "--sparse-policy", "none", "--save-strategy", "no", "--recipe-args", "last=1", *QUICK, *seed,
        )  # fmt: skip
        assert status == 0, err
        return (tmp_path / folder / "model.safetensors").read_bytes()

    first = weights("first")
    assert weights("second") == first
    assert weights("third", "--seed", 7) != first
