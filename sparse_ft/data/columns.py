"""Which columns hold the images, the texts and the labels, and which task follows from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, get_args

import datasets

from .errors import DataError
from .source import IMAGE_SUFFIXES

# The names of the Hub's pipeline tags; text-generation is causal language modelling.
Task = Literal["image-classification", "text-classification", "text-generation"]
TASKS: tuple[Task, ...] = get_args(Task)

LABEL_NAMES = ("label", "labels", "target", "class", "category", "fine_label")
IMAGE_NAMES = ("image", "img", "pixel_values", "image_path", "file_name", "file", "path")
# Sentence pairs of GLUE and its relatives, in the order a model reads them.
TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
)
TEXT_NAMES = ("text", "sentence", "content", "review", "document")


@dataclass(frozen=True)
class Columns:
    """The columns a task reads.

    Attributes:
        task: what the columns are good for.
        image: column of images (encoded, or paths to them).
        text: one column of texts, or two of sentence pairs.
        label: column of classes.
    """

    task: Task
    image: str | None = None
    text: tuple[str, ...] = ()
    label: str | None = None


def find_columns(
    rows: datasets.Dataset,
    task: Task | None = None,
    *,
    image: str | None = None,
    text: Sequence[str] = (),
    label: str | None = None,
) -> Columns:
    """Finds the columns for `task`, or the task for the columns.

    Images with a label make image classification, one or two string columns with a label text classification, text
    alone causal language modelling. `image`, `text` and `label` name columns that are not to be guessed.

    Raises:
        DataError: a named column does not exist, or a needed one is not found.
    """
    for name in filter(None, (image, label, *text)):
        if name not in rows.column_names:
            raise DataError(f"the dataset has no column {name!r}; its columns: {', '.join(rows.column_names)}")
    if len(text) > 2:
        raise DataError(f"at most two text columns make an example, {len(text)} were named: {', '.join(text)}")
    label = label or _find_label(rows)
    image = image or (None if text else _find_image(rows))
    if task is None:
        task = _infer_task(rows, image, label, text)
    if task == "image-classification":
        if image is None:
            raise DataError(_missing(rows, "image", "--image-column"))
        if label is None:
            raise DataError(_missing(rows, "label", "--label-column"))
        return Columns(task, image=image, label=label)
    texts = tuple(text) or _find_text(rows, label)
    if task == "text-generation":
        return Columns(task, text=texts[:1])
    if label is None:
        raise DataError(_missing(rows, "label", "--label-column"))
    return Columns(task, text=texts, label=label)


def _infer_task(rows: datasets.Dataset, image: str | None, label: str | None, text: Sequence[str]) -> Task:
    if image is not None:
        return "image-classification"
    if not text and not _string_columns(rows, label):
        raise DataError(
            f"the dataset has neither an image nor a text column; its columns: {', '.join(rows.column_names)}"
        )
    return "text-classification" if label is not None else "text-generation"


def _missing(rows: datasets.Dataset, what: str, option: str) -> str:
    return f"no {what} column found; name it with {option}; the columns are {', '.join(rows.column_names)}"


def _find_label(rows: datasets.Dataset) -> str | None:
    for name in LABEL_NAMES:
        if name in rows.column_names:
            return name
    typed = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    return typed[0] if len(typed) == 1 else None


def _find_image(rows: datasets.Dataset) -> str | None:
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image) or is_image_struct(feature):
            return name
    for name in IMAGE_NAMES:
        if name in rows.column_names and _holds_image_paths(rows, name):
            return name
    return None


def is_image_struct(feature: object) -> bool:
    """True for images as parquet stores them when the file does not say that they are images."""
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}


def _holds_image_paths(rows: datasets.Dataset, column: str) -> bool:
    if not _is_string(rows.features[column]) or len(rows) == 0:
        return False
    return PurePath(str(rows[0][column])).suffix.lower() in IMAGE_SUFFIXES


def _is_string(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _string_columns(rows: datasets.Dataset, label: str | None) -> list[str]:
    return [name for name, feature in rows.features.items() if _is_string(feature) and name != label]


def _find_text(rows: datasets.Dataset, label: str | None) -> tuple[str, ...]:
    strings = _string_columns(rows, label)
    for pair in TEXT_PAIRS:
        if set(pair) <= set(strings):
            return pair
    for name in TEXT_NAMES:
        if name in strings:
            return (name,)
    if len(strings) in (1, 2):
        return tuple(strings)
    if not strings:
        raise DataError(_missing(rows, "text", "--text-columns"))
    raise DataError(f"several columns hold text ({', '.join(strings)}); name one or two with --text-columns")
