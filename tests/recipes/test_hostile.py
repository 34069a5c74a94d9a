"""A recipe from a stranger can set fields, and nothing else; reading it takes neither long nor much memory."""

import time

import pytest

from sparse_ft.methods.targets import compile_pattern
from sparse_ft.recipes import Recipe, RecipeError

RATE = "modifiers:\n  - !SetLearningRateModifier\n    learning_rate: {}\n"


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')",
        "open('/etc/passwd')",
        "().__class__",
        "a.real",
        "[x for x in (1, 2)]",
        "lambda: 1",
        "(1).__class__",
        "'a' * 3",
        "abs.__name__",
        "max(*[1, 2])",
        "1 if True else 2",
        "True + 1",
        "1 and 2",
        "f'{1}'",
        "9 ** 9 ** 9 ** 9",
        "2 ** 1000000",
        "10 ** 300 * 10 ** 300",
        "(-8) ** 0.5",
        "1 / 0",
        "(" * 400 + "1" + ")" * 400,
        "1" * 600,
        "1; 2",
        "int('5')",
        "a := 5",
    ],
)
def test_expressions_are_arithmetic_only(expression):
    began = time.perf_counter()
    with pytest.raises(RecipeError):
        Recipe.load("a: 1\n" + RATE.format(f'"eval({expression})"' if '"' not in expression else "x"))
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "!!python/object:builtins.object {}",
        "!!binary aGVsbG8=",
        "!<tag:example.com,2000:thing> {}",
        "!SetLearningRateModifier {learning_rate: 1}",
    ],
)
def test_no_tag_does_anything(tag):
    with pytest.raises(RecipeError, match="tag"):
        Recipe.load(RATE.format(tag))


def test_aliases_do_not_grow_without_bound():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(RecipeError, match="values when aliases are expanded"):
        Recipe.load("\n".join(lines) + "\n" + RATE.format(1))


@pytest.mark.parametrize("text", ["a: &a [*a]\n", "a: &a {b: *a}\n"])
def test_no_alias_contains_itself(text):
    with pytest.raises(RecipeError, match="contains it"):
        Recipe.load(text + RATE.format(1))


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_deep_nesting_is_refused(opening):
    text = "a: " + opening * 5000 if opening != "- " else opening * 5000 + "1"
    with pytest.raises(RecipeError, match="levels deep"):
        Recipe.load(text + "\n")


def test_size_is_limited():
    with pytest.raises(RecipeError, match="characters"):
        Recipe.load("# " + "x" * 3_000_000 + "\n")


def test_chains_of_variables_are_limited():
    lines = [f"v{i}: eval(v{i + 1})" for i in range(5000)] + ["v5000: 1"]
    with pytest.raises(RecipeError):
        Recipe.load("\n".join(lines) + "\n" + RATE.format("eval(v0)"))


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(.*)*x", "(aa|a)*b", "(aa?)*b", "(?:(a{1,30})){2,30}", ".*.*.*.*.*.*.*.*x", "a" * 500, "(?=(a+)+b)"],
)
def test_patterns_that_may_take_forever_are_refused(pattern):
    pattern = f"re:{pattern}"
    with pytest.raises(ValueError):
        compile_pattern(pattern)


@pytest.mark.parametrize("pattern", ["re:.*.layer.*.attention.*.weight", "re:model\\.layers\\.\\d+$", "re:(a|b)?c.*"])
def test_ordinary_patterns_are_not(pattern):
    compile_pattern(pattern)


def test_a_recipe_cannot_name_files(tmp_path):
    secret = tmp_path / "secret.yaml"
    secret.write_text("x: 1\n")
    with pytest.raises(RecipeError):
        Recipe.load(RATE.format(f"!include {secret}"))
