"""Errors of recipes: one line that says where, what is wrong, and what would be right."""

from typing import Any

_LONGEST = 800  # characters; what a recipe holds is quoted in its errors


class RecipeError(ValueError):
    """A recipe cannot be read or run.

    Attributes:
        recipe: its path, Hub id, or "recipe text".
        line: in the file, from 1; None if no line is to blame.
        modifier, field: names; None if the error is not in one.
        value: the wrong value.
        problem: what is wrong and what would be right.
    """

    def __init__(
        self,
        problem: str,
        *,
        recipe: str = "recipe",
        line: int | None = None,
        modifier: str | None = None,
        field: str | None = None,
        value: Any = None,
    ):
        where = recipe if line is None else f"{recipe}, line {line}"
        what = ".".join(part for part in (modifier, field) if part)
        text = ": ".join(part for part in (where, what, problem) if part)
        super().__init__(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...")
        self.problem = problem
        self.recipe = recipe
        self.line = line
        self.modifier = modifier
        self.field = field
        self.value = value
