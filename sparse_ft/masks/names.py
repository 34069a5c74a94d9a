"""Layers chosen by name: exact names and `re:` patterns, as recipes and `ignore=` write them."""

import difflib
import re
from collections.abc import Iterable, Sequence

PATTERN_PREFIX = "re:"
# What DistributedDataParallel and DataParallel put before every name of the model they wrap.
WRAPPER_PREFIX = "module."


def match_names(entries: Iterable[str], names: Sequence[str]) -> dict[str, list[str]]:
    """For each entry the layer names that it selects, in the order of `names`.

    An entry is a layer's name, the name of its weight (`layer1.0.conv1.weight`), or `re:` and a regular expression
    that is matched from the beginning (`re.match`) against both. A leading `module.`, as DistributedDataParallel
    writes it, may be there or not.

    Raises:
        ValueError: An entry selects nothing (the message names the nearest layers), or is not a regular expression.
    """
    return {entry: _select(entry, names) for entry in entries}


def _select(entry: str, names: Sequence[str]) -> list[str]:
    if not isinstance(entry, str):
        raise ValueError(f"layer names must be strings, not {type(entry).__name__}: {entry!r}")
    found = _search(entry, names)
    if not found:
        raise ValueError(f"{entry!r} matches no prunable layer{_hint(entry, names)}")
    return found


def _search(entry: str, names: Sequence[str]) -> list[str]:
    if entry.startswith(PATTERN_PREFIX):
        source = entry.removeprefix(PATTERN_PREFIX)
        try:
            pattern = re.compile(source)
            unwrapped = re.compile(re.sub(r"^(\^?)module\\?\.", r"\1", source))
        except re.error as error:
            raise ValueError(f"{entry!r} is not a regular expression: {error}") from error
        return _matching(pattern, names) or _matching(unwrapped, names)
    for candidate in (entry, entry.removeprefix(WRAPPER_PREFIX)):
        found = [name for name in names if candidate in (name, weight_name(name))]
        if found:
            return found
    return []


def _matching(pattern: re.Pattern[str], names: Sequence[str]) -> list[str]:
    return [name for name in names if pattern.match(name) or pattern.match(weight_name(name))]


def weight_name(layer: str) -> str:
    """Name of a layer's weight in the state dict; the layer of a model that is one layer has the name ''."""
    return f"{layer}.weight" if layer else "weight"


def _hint(entry: str, names: Sequence[str]) -> str:
    if not names:
        return ": the model has none"
    if entry.startswith(PATTERN_PREFIX):
        return f"; the first layers are {_quoted(names[:3])}"
    inside = [name for name in names if name.startswith(f"{entry}.")]
    if inside:
        return f'; for the {len(inside)} layers inside it write "re:{re.escape(entry)}\\."'
    nearest = difflib.get_close_matches(entry, names, n=3, cutoff=0.4)
    return f"; did you mean {_quoted(nearest)}?" if nearest else f"; the first layers are {_quoted(names[:3])}"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
