"""What a modifier's fields may hold: each kind reads a plain value of a recipe, or says what would be right."""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

NEVER = -1.0  # an end that does not come, or a start at once

_REQUIRED = object()


class FieldError(ValueError):
    """A field of a modifier is wrong; `field` is its name (None if the fields contradict each other)."""

    def __init__(self, modifier: str, field: str | None, message: str):
        where = modifier if field is None else f"{modifier}.{field}"
        super().__init__(f"{where}: {message}")
        self.modifier = modifier
        self.field = field
        self.message = message


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        what: the values that are right, to be read after "must be".
        read: gives the value as the modifier keeps it, or raises ValueError for a wrong one.
    """

    what: str
    read: Callable[[Any], Any]


class Field:
    """A declared field: a class attribute of a modifier, which its instances replace with their value.

    Args:
        default: None needs a `kind` that allows it; without a default the field is required.
        unit: of the number, such as "epochs".
        doc: one sentence.
    """

    name: str

    def __init__(self, kind: Kind, default: Any, unit: str, doc: str):
        self.kind = kind
        self.default = default
        self.unit = unit
        self.doc = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @property
    def required(self) -> bool:
        return self.default is _REQUIRED


def field(kind: Kind, default: Any = _REQUIRED, *, unit: str = "", doc: str) -> Any:
    """Declares a field; see `Field`. (Any: to a type checker the attribute has its value's type.)"""
    return Field(kind, default, unit, doc)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False) -> Kind:
    """A finite number from `low` to `high`; `above` and `below` exclude the bounds themselves."""
    bounds = []
    if low > -math.inf:
        bounds.append(f"above {low:g}" if above else f"at least {low:g}")
    if high < math.inf:
        bounds.append(f"below {high:g}" if below else f"at most {high:g}")

    def read(value: Any) -> float:
        if not _is_number(value) or not low <= value <= high or (above and value == low) or (below and value == high):
            raise ValueError
        return float(value)

    return Kind(" ".join(["a number", " and ".join(bounds)]).strip(), read)


def integer(low: int) -> Kind:
    """A whole number of at least `low`; 4.0 counts as one, as arithmetic in recipes gives it."""

    def read(value: Any) -> int:
        if not _is_number(value) or value != int(value) or value < low:
            raise ValueError
        return int(value)

    return Kind(f"a whole number of at least {low}", read)


def _read_epoch(value: Any) -> float:
    if not _is_number(value) or (value < 0 and value != NEVER):
        raise ValueError
    return float(value)


EPOCH = Kind("an epoch of at least 0, or -1", _read_epoch)


def _read_flag(value: Any) -> bool:
    if value not in (True, False):  # also 0 and 1, which recipes use
        raise ValueError
    return bool(value)


FLAG = Kind("true or false", _read_flag)


def _read_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


TEXT = Kind("a text", _read_text)


def choice(*values: str) -> Kind:
    """One of a few words."""

    def read(value: Any) -> str:
        if value not in values:
            near = difflib.get_close_matches(str(value), values, n=1)
            raise ValueError(f"did you mean {near[0]!r}?" if near else "")
        return str(value)

    return Kind("one of " + ", ".join(values), read)


def exactly(value: Any, shown: str | None = None) -> Kind:
    """One constant."""

    def read(given: Any) -> Any:
        if type(given) is not type(value) or given != value:
            raise ValueError
        return value

    return Kind(shown or repr(value), read)


NOTHING = exactly(None, "nothing")


def _read_mapping(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return dict(value)


MAPPING = Kind("a mapping", _read_mapping)
ANYTHING = Kind("anything", lambda value: value)


def listing(kind: Kind, what: str) -> Kind:
    """A list of values of one kind."""

    def read(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise ValueError
        return [kind.read(each) for each in value]

    return Kind(f"a list of {what}", read)


TEXTS = listing(TEXT, "texts")
INTEGERS = listing(integer(0), "whole numbers")


def either(*kinds: Kind) -> Kind:
    """A value of the first kind that fits."""

    def read(value: Any) -> Any:
        hints = []
        for kind in kinds:
            try:
                return kind.read(value)
            except ValueError as error:
                hints.append(str(error))
        raise ValueError(next(filter(None, hints), ""))

    return Kind(", or ".join(kind.what for kind in kinds), read)


def read_fields(modifier: str, fields: dict[str, Field], values: dict[str, Any]) -> dict[str, Any]:
    """The value of every field.

    Raises:
        FieldError: an unknown field, one of a wrong value, or one that is missing.
    """
    for name in values:
        if name not in fields:
            raise FieldError(modifier, name, f"unknown field{_nearest(name, list(fields))}")
    read = {}
    for name, declared in fields.items():
        if name in values:
            try:
                read[name] = declared.kind.read(values[name])
            except ValueError as error:
                unit = f" ({declared.unit})" if declared.unit else ""
                hint = f"; {error}" if str(error) else ""
                raise FieldError(
                    modifier, name, f"must be {declared.kind.what}{unit}, not {_shown(values[name])}{hint}"
                ) from None
        elif declared.required:
            raise FieldError(modifier, name, f"is missing; it must be {declared.kind.what}: {declared.doc}")
        else:
            read[name] = declared.default
    return read


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; the fields are {', '.join(known)}" if known else "; it has no fields"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
