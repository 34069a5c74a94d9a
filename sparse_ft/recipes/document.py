"""A recipe as it is written: stages, groups and entries in their order, before any value is checked.

Three dialects are read:

* flat: lists of tagged modifiers (`- !GMPruningModifier`) under keys whose names contain "modifiers"; all other keys
  are variables;
* staged: the same inside stages, mappings of any name; epochs count from the beginning of training in all of them;
* mappings ("new"): `NAME_stage:` with `GROUP_modifiers:`, mappings from a modifier's name to its fields.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import RecipeError
from .yaml_text import Located, Tagged, load_yaml, plain

Dialect = Literal["flat", "staged", "new"]

_GROUP_WORD = "modifiers"
_STAGE_SUFFIX = "_stage"
_META = ("version", "metadata", "__metadata__")
_RUN_TYPE = "run_type"
_ARGS = "args"


@dataclass
class Entry:
    """A modifier as it is written: `fields` may still be expressions."""

    type_name: str
    fields: dict[str, Any]
    line: int | None = None
    lines: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entry) and (self.type_name, self.fields) == (other.type_name, other.fields)


@dataclass
class Group:
    """A named list of modifiers; the name is for the reader only."""

    name: str
    entries: list[Entry]


@dataclass
class Stage:
    """Groups with variables of their own; the one stage of a flat recipe has the name ''."""

    name: str
    groups: list[Group] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    run_type: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def one_shot(self) -> bool:
        """Whether its modifiers do all that they have to do at one step, before the training."""
        return self.run_type == "oneshot"


@dataclass
class Document:
    """A recipe as it is written; `order` has its top-level keys."""

    dialect: Dialect
    stages: list[Stage]
    variables: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def entries(self) -> Iterator[tuple[Stage, Entry]]:
        """Every modifier with its stage, in order."""
        for stage in self.stages:
            for group in stage.groups:
                for entry in group.entries:
                    yield stage, entry


def parse_document(text: str, recipe: str) -> Document:
    """Reads the YAML of a recipe.

    Args:
        recipe: its name, for errors.

    Raises:
        RecipeError: it is not YAML or has no modifiers.
    """
    top = load_yaml(text, recipe)
    if not isinstance(top, Located):
        raise RecipeError("is not a mapping of names to values", recipe=recipe)
    parser = _Parser(recipe)
    for key in top:
        if not isinstance(key, str):
            raise parser.error(f"the key {key!r} must be a word", top.lines[key])
    has_groups = any(_is_group(key) for key in top)
    stages = [key for key, value in top.items() if isinstance(value, Located) and any(map(_is_group, value))]
    if has_groups:
        document = parser.flat(top)
    elif stages and all(key.endswith(_STAGE_SUFFIX) for key in stages) and not _has_tags(top):
        document = parser.staged(top, stages, "new")
    elif stages:
        document = parser.staged(top, stages, "staged")
    else:
        raise RecipeError(_no_modifiers(top), recipe=recipe)
    if not any(document.entries()):
        raise RecipeError("has no modifiers", recipe=recipe)
    return document


def _no_modifiers(top: Located) -> str:
    for key, value in top.items():
        if isinstance(value, str) and _GROUP_WORD in value:
            return f"has no modifiers; the text under {key!r} (line {top.lines[key]}) looks like a recipe of its own"
    return 'has no modifiers: neither a list under a key with "modifiers" in its name nor a stage with one'


def _is_group(key: Any) -> bool:
    return isinstance(key, str) and _GROUP_WORD in key


def _has_tags(value: Any) -> bool:
    if isinstance(value, Tagged):
        return True
    if isinstance(value, dict):
        return any(map(_has_tags, value.values()))
    return isinstance(value, list) and any(map(_has_tags, value))


class _Parser:
    def __init__(self, recipe: str):
        self.recipe = recipe

    def error(self, problem: str, line: int | None) -> RecipeError:
        return RecipeError(problem, recipe=self.recipe, line=line)

    def flat(self, top: Located) -> Document:
        stage = Stage("")
        document = Document("flat", [stage])
        for key, value in top.items():
            if _is_group(key):
                stage.groups.append(self.tagged_group(key, value, top.lines[key]))
            elif key in _META:
                document.meta[key] = plain(value)
            else:
                document.variables[key] = self.variable(key, value, top.lines[key])
        return document

    def staged(self, top: Located, stages: list[str], dialect: Dialect) -> Document:
        document = Document(dialect, [])
        for key, value in top.items():
            if key in stages:
                document.stages.append(self.stage(key, value, dialect))
            elif key in _META:
                document.meta[key] = plain(value)
            elif key == _ARGS and dialect == "new" and isinstance(value, dict):
                document.variables |= plain(value)
            else:
                document.variables[key] = self.variable(key, value, top.lines[key])
        return document

    def stage(self, name: str, content: Located, dialect: Dialect) -> Stage:
        stage = Stage(name)
        for key, value in content.items():
            line = content.lines[key]
            if _is_group(key):
                read = self.mapping_group if dialect == "new" else self.tagged_group
                stage.groups.append(read(key, value, line))
            elif key == _RUN_TYPE and dialect == "new":
                if value not in ("train", "oneshot"):
                    raise self.error(f"run_type must be train or oneshot, not {value!r}", line)
                stage.run_type = value
            elif key in _META:
                stage.meta[key] = plain(value)
            elif key == _ARGS and dialect == "new" and isinstance(value, dict):
                stage.variables |= plain(value)
            else:
                stage.variables[key] = self.variable(key, value, line)
        if dialect == "new" and stage.run_type is None and "oneshot" in name.lower():
            stage.run_type = "oneshot"  # as llm-compressor understands it
        return stage

    def tagged_group(self, name: str, value: Any, line: int) -> Group:
        if isinstance(value, Located) and value and all(isinstance(each, dict | None) for each in value.values()):
            raise self.error(
                f"{name!r} maps names to fields; in this dialect modifiers are a list: - !{next(iter(value))}", line
            )
        if not isinstance(value, list):
            raise self.error(f"{name!r} must be a list of modifiers, not {_shown(value)}", line)
        entries = []
        for each in value:
            if not isinstance(each, Tagged):
                raise self.error(
                    f"{name!r} must hold modifiers such as - !GMPruningModifier, not {_shown(each)}", line
                )
            entries.append(self.entry(each.tag, each, each.line))
        return Group(name, entries)

    def mapping_group(self, name: str, value: Any, line: int) -> Group:
        if not isinstance(value, Located):
            raise self.error(f"{name!r} must map names of modifiers to their fields, not {_shown(value)}", line)
        entries = []
        for type_name, fields in value.items():
            at = value.lines[type_name]
            if fields is None:
                fields = Located(at)
            if not isinstance(type_name, str) or not isinstance(fields, Located):
                raise self.error(f"{type_name!r} must be followed by fields (name: value)", at)
            entries.append(self.entry(type_name, fields, at))
        return Group(name, entries)

    def entry(self, name: str, fields: Tagged | Located, line: int) -> Entry:
        for key, value in fields.items():
            if not isinstance(key, str):
                raise self.error(f"the field {key!r} must be a word", fields.lines[key])
            self.refuse_tags(value, fields.lines[key])
        # A tag may carry a module's name: !pytorch.GMPruningModifier.
        return Entry(name.lstrip("!").rpartition(".")[2], plain(fields), line, dict(fields.lines))

    def variable(self, name: str, value: Any, line: int) -> Any:
        self.refuse_tags(value, line, f'; modifiers stand under a key with "modifiers" in its name, not {name!r}')
        return plain(value)

    def refuse_tags(self, value: Any, line: int, hint: str = "") -> None:
        if isinstance(value, Tagged):
            raise self.error(f"the tag {value.tag} is not allowed here{hint}", value.line)
        if isinstance(value, list | dict):
            for each in value.values() if isinstance(value, dict) else value:
                self.refuse_tags(each, line, hint)


def _shown(value: Any) -> str:
    text = repr(plain(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
