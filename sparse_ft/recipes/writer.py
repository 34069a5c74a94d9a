"""Writes a recipe so that it reads back equal: the same dialect, order and expressions."""

import json
import re
from typing import Any

import yaml

from .document import Document, Entry, Stage
from .yaml_text import parse_scalar

_WORD = re.compile(r"[A-Za-z_][\w./-]*|eval\([\w .+*/()%-]*\)")


def dump_document(document: Document) -> str:
    """The text of a recipe; see `Recipe.dump`."""
    blocks = [_mapping(document.meta, 0), _mapping(document.variables, 0)]
    for stage in document.stages:
        blocks.append(_stage(stage, document.dialect))
    return "\n".join(block for block in blocks if block)


def _stage(stage: Stage, dialect: str) -> str:
    indent = 0 if dialect == "flat" else 2
    parts = [] if dialect == "flat" else [f"{_key(stage.name)}:\n"]
    if stage.run_type and dialect == "new":
        parts.append(f"  run_type: {stage.run_type}\n")
    parts += [_mapping(stage.meta, indent), _mapping(stage.variables, indent)]
    for group in stage.groups:
        if dialect == "flat" and "".join(parts):
            parts.append("\n")
        parts.append(
            f"{' ' * indent}{_key(group.name)}:{'' if group.entries else ' {}' if dialect == 'new' else ' []'}\n"
        )
        for i, entry in enumerate(group.entries):
            if i and dialect != "new":
                parts.append("\n")
            parts.append(_entry(entry, indent + 2, dialect))
    return "".join(parts)


def _entry(entry: Entry, indent: int, dialect: str) -> str:
    pad = " " * indent
    if dialect == "new":
        head = f"{pad}{entry.type_name}:" + ("" if entry.fields else " {}")
        return f"{head}\n{_mapping(entry.fields, indent + 2)}"
    return f"{pad}- !{entry.type_name}{'' if entry.fields else ' {}'}\n{_mapping(entry.fields, indent + 4)}"


def _mapping(values: dict[str, Any], indent: int) -> str:
    if not values:
        return ""
    pad = " " * indent
    return "".join(f"{pad}{_key(key)}:{_value(value, indent)}\n" for key, value in values.items())


def _value(value: Any, indent: int) -> str:
    """A value after its key: on the same line if it is short."""
    if not isinstance(value, list | dict) or not value or len(inline := _inline(value)) + indent <= 100:
        return f" {_inline(value)}" if not isinstance(value, list | dict) or not value else f" {inline}"
    pad = " " * (indent + 2)
    if isinstance(value, dict):
        return "\n" + _mapping(value, indent + 2).rstrip("\n")
    return "\n" + "\n".join(f"{pad}- {_inline(each)}" for each in value)


def _inline(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(key)}: {_inline(each)}" for key, each in value.items()) + "}"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, float):
        return _float(value)
    return str(value)


def _float(value: float) -> str:
    text = repr(value)
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")  # which YAML 1.1 reads as a number, too
    return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(text, text)


def _text(value: str) -> str:
    if _WORD.fullmatch(value) and parse_scalar(value) == value:
        return value
    # JSON's strings are YAML's double-quoted ones.
    return (
        json.dumps(value, ensure_ascii=False)
        if value.isprintable()
        else yaml.safe_dump(value, default_style='"', width=2**31, allow_unicode=False).strip()
    )


def _key(key: Any) -> str:
    return _inline(key)
