"""Modifiers by the name that recipes give them."""

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from .base import Modifier

M = TypeVar("M", bound="type[Modifier]")

_REGISTRY: "dict[str, type[Modifier]]" = {}


def register(name: str) -> Callable[[M], M]:
    """Class decorator: recipes know the modifier as `name`, such as "GMPruningModifier"."""

    def add(cls: M) -> M:
        if name in _REGISTRY:
            raise ValueError(f"a modifier named {name!r} is registered already: {_REGISTRY[name].__qualname__}")
        cls.type_name = name
        _REGISTRY[name] = cls
        return cls

    return add


def find_modifier(name: str) -> "type[Modifier]":
    """The class of a name.

    Raises:
        KeyError: there is none; its argument says which names are near.
    """
    if name not in _REGISTRY:
        near = difflib.get_close_matches(name, _REGISTRY, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`sparse-ft recipe modifiers` lists them"
        raise KeyError(f"unknown modifier {name!r}; {hint}")
    return _REGISTRY[name]


def modifiers() -> "dict[str, type[Modifier]]":
    """Every registered modifier by its name, sorted."""
    return dict(sorted(_REGISTRY.items()))
