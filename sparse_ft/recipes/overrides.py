"""Values that replace a recipe's variables: a mapping, JSON, or `name=value,name=value`."""

import json
import re
from collections.abc import Mapping
from typing import Any

from .errors import RecipeError
from .yaml_text import parse_scalar

_PAIR = re.compile(r"\s*([A-Za-z_]\w*)\s*[=:]\s*(.*?)\s*", re.DOTALL)


def parse_overrides(args: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The values by variable.

    Raises:
        RecipeError: a text that is neither JSON nor pairs.
    """
    if args is None:
        return {}
    if isinstance(args, Mapping):
        return {str(name): value for name, value in args.items()}
    text = args.strip()
    if text.startswith("{"):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"are not JSON: {error}", recipe="recipe arguments") from None
        return dict(values)
    pairs: dict[str, Any] = {}
    for part in _split(text):
        match = _PAIR.fullmatch(part)
        if match is None:
            raise RecipeError(f"must be name=value,name=value or JSON, not {part!r}", recipe="recipe arguments")
        pairs[match[1]] = parse_scalar(match[2])
    return pairs


def _split(text: str) -> list[str]:
    """Parts between commas that begin a new pair; a value such as eval(max(a, b)) has commas of its own."""
    return [part for part in re.split(r",(?=\s*[A-Za-z_]\w*\s*[=:])", text) if part.strip()]
