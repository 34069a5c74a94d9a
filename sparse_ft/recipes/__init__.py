"""Recipes: text to checked modifiers and back. See docs/recipes.md."""

from .errors import RecipeError
from .recipe import Recipe

__all__ = ["Recipe", "RecipeError"]
