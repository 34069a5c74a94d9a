"""docs/recipes.md is current, and its examples run."""

import re
from pathlib import Path

from sparse_ft.methods import registry
from sparse_ft.recipes import Recipe
from sparse_ft.recipes.reference import modifier_reference

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()


def test_the_modifiers_are_those_of_the_code():
    assert PAGE.endswith(f"<!-- modifiers -->\n\n{modifier_reference()}"), (
        "renew it: sparse-ft recipe modifiers --markdown"
    )


def test_examples_run(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # the page registers a method
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "recipes.md", "exec"), {"__name__": "recipes"})
    assert "RandomPruningModifier" in registry._REGISTRY
    (recipe,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert Recipe.load(recipe).max_epochs == 30
