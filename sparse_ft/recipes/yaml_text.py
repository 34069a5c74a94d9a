"""YAML as data: plain values with the lines that they stand on, and nothing that runs code or grows without bound.

What is read is YAML 1.1 as PyYAML's safe loader reads it, except where that surprises: `1e-4` is a number, `2:4` a
text (and not 124), a date a text, and a key that is there twice an error.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from .errors import RecipeError

MAX_CHARACTERS = 2_000_000
MAX_DEPTH = 40
MAX_VALUES = 200_000  # after aliases are expanded

_NULLS = ("", "~", "null", "Null", "NULL")
_TRUE = ("true", "True", "TRUE", "yes", "Yes", "YES", "on", "On", "ON")
_FALSE = ("false", "False", "FALSE", "no", "No", "NO", "off", "Off", "OFF")
_INTEGER = re.compile(r"[-+]?\d[\d_]*")
_HEX = re.compile(r"[-+]?0x[\da-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NOT_A_NUMBER = (".nan", ".NaN", ".NAN")
_MERGE = "<<"
_LONGEST_NUMBER = 40  # digits


class Tagged(dict[str, Any]):
    """A mapping under a tag of its own (`!GMPruningModifier`); `lines` of its keys, `line` of the tag."""

    def __init__(self, tag: str, line: int):
        super().__init__()
        self.tag = tag
        self.line = line
        self.lines: dict[str, int] = {}


class Located(dict[Any, Any]):
    """A mapping that knows the lines of its keys."""

    def __init__(self, line: int):
        super().__init__()
        self.line = line
        self.lines: dict[Any, int] = {}


def plain(value: Any) -> Any:
    """The value without lines."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value


def parse_scalar(text: str) -> Any:
    """The value of an unquoted text."""
    if text in _NULLS:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if len(text) <= _LONGEST_NUMBER:
        if _INTEGER.fullmatch(text):
            return int(text.replace("_", ""))
        if _HEX.fullmatch(text):
            return int(text, 16)
        if _FLOAT.fullmatch(text):
            return float(text.replace("_", ""))
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if text in _NOT_A_NUMBER:
        return float("nan")
    return text


def load_yaml(text: str, recipe: str) -> Any:
    """The values of a YAML text: mappings are `Located`, those under a tag `Tagged`.

    Args:
        recipe: its name, for errors.

    Raises:
        RecipeError: it is not YAML, has a tag where none is allowed, or is too large.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"has {len(text):,} characters, {MAX_CHARACTERS:,} are allowed", recipe=recipe)
    try:
        _check_depth(text, recipe)
        # The C parser is not used: it gives other messages, and recipes are small.
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _yaml_error(error, recipe) from None
    if node is None:
        raise RecipeError("is empty", recipe=recipe)
    return _Reader(recipe).read(node)


def _check_depth(text: str, recipe: str) -> None:
    """Finds deep nesting before a recursive parser does."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.SequenceStartEvent | yaml.MappingStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                line = event.start_mark.line + 1 if event.start_mark else None
                raise RecipeError(f"is nested more than {MAX_DEPTH} levels deep", recipe=recipe, line=line)
        elif isinstance(event, yaml.SequenceEndEvent | yaml.MappingEndEvent):
            depth -= 1


def _yaml_error(error: yaml.YAMLError, recipe: str) -> RecipeError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    context = getattr(error, "context", None)
    if "undefined alias" in problem:
        problem += "; an anchor (&name) has to stand before it"
    elif context:
        problem = f"{context}: {problem}"
    return RecipeError(f"is not YAML: {problem}", recipe=recipe, line=None if mark is None else mark.line + 1)


@dataclass
class _Reader:
    recipe: str
    values: int = 0
    pending: list[int] = field(default_factory=list)

    def read(self, node: yaml.Node) -> Any:
        """The value of a node."""
        if id(node) in self.pending or len(self.pending) > MAX_DEPTH:
            raise self._error("an alias stands for something that contains it, or the nesting is too deep", node)
        self.values += 1
        if self.values > MAX_VALUES:
            raise self._error(f"has more than {MAX_VALUES:,} values when aliases are expanded", node)
        self.pending.append(id(node))
        try:
            return self._read(node)
        finally:
            self.pending.pop()

    def _read(self, node: yaml.Node) -> Any:
        own_tag = node.tag.startswith("!")
        if not own_tag and not node.tag.startswith("tag:yaml.org,2002:"):
            raise self._error(f"the tag {node.tag!r} is not allowed", node)
        if isinstance(node, yaml.ScalarNode):
            if own_tag:
                if node.value.strip():
                    raise self._error(f"{node.tag} needs fields (name: value), not {node.value[:40]!r}", node)
                return Tagged(node.tag, node.start_mark.line + 1)
            self._check_tag(node, ("str", "int", "float", "bool", "null", "timestamp", "merge", "value"))
            return parse_scalar(node.value) if node.style is None else node.value
        if isinstance(node, yaml.SequenceNode):
            if own_tag:
                raise self._error(f"{node.tag} needs fields (name: value), not a list", node)
            self._check_tag(node, ("seq",))
            return [self.read(each) for each in node.value]
        assert isinstance(node, yaml.MappingNode)
        self._check_tag(node, ("map",), own_tag)
        line = node.start_mark.line + 1
        result: Tagged | Located = Tagged(node.tag, line) if own_tag else Located(line)
        for key_node, value_node in self._pairs(node):
            key = self.read(key_node)
            if isinstance(key, dict | list):
                raise self._error("a key must be a word or a number", key_node)
            if key in result:
                raise self._error(f"{key!r} is there twice, first in line {result.lines[key]}", key_node)
            result.lines[key] = key_node.start_mark.line + 1
            result[key] = self.read(value_node)
        return result

    def _pairs(self, node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
        """Keys and values, those merged in (`<<: *defaults`) unless the mapping has them itself."""
        own = {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
        for key, value in node.value:
            if not (isinstance(key, yaml.ScalarNode) and key.value == _MERGE and key.style is None):
                yield key, value
                continue
            for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(merged, yaml.MappingNode):
                    raise self._error("<< needs a mapping", value)
                for pair in merged.value:
                    if isinstance(pair[0], yaml.ScalarNode) and pair[0].value not in own:
                        own.add(pair[0].value)
                        yield pair

    def _check_tag(self, node: yaml.Node, allowed: tuple[str, ...], own_tag: bool = False) -> None:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if not own_tag and kind not in allowed:
            raise self._error(f"the tag '!!{kind}' is not allowed", node)

    def _error(self, problem: str, node: yaml.Node) -> RecipeError:
        return RecipeError(problem, recipe=self.recipe, line=node.start_mark.line + 1)
