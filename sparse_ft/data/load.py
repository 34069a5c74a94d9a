"""From a dataset's name to labelled splits and the task they are good for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np

from .columns import Columns, Task, find_columns, is_image_struct
from .errors import DataError
from .labels import read_labels
from .source import open_dataset
from .splits import Split, hold_out

HOLDOUT_FRACTION = 0.1
# Datasets of characters: mirrored they are another character, and they fill their frame.
GLYPHS = {"digits"}


@dataclass(frozen=True)
class Data:
    """A dataset, understood.

    Attributes:
        name: what the user called it.
        columns: which columns are read, and the task.
        train, eval: the splits.
        label_names: class names by index; empty without classes.
        glyphs: whether the images are characters, not to be mirrored or cut at the border.
        notes: what was decided for the user, one sentence each, to be announced.
    """

    name: str
    columns: Columns
    train: Split
    eval: Split
    label_names: list[str] = field(default_factory=list)
    glyphs: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def task(self) -> Task:
        return self.columns.task


def load_data(
    name: str | Mapping[str, str],
    *,
    task: Task | None = None,
    config: str | None = None,
    image_column: str | None = None,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    seed: int = 42,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> Data:
    """Finds a dataset, its task, its columns and its splits.

    The evaluation split is `validation`, else `test`, else a stratified tenth of the training rows chosen by `seed`.

    Args:
        name: a bundled name (`digits`), a folder of images by class, a parquet, csv, json or txt file or a folder of
            such files named train*, validation*, test*, or a Hub id; or a file or folder for each split, as in
            `{"train": "a.csv", "validation": "b.csv"}`.
        task: one of `TASKS`; by default what the columns suggest.
        config: configuration of a Hub dataset.
        image_column, text_columns, label_column: columns not to be guessed.
        max_train_samples, max_eval_samples: keep at most so many rows of a split, drawn with `seed`.

    Raises:
        DataError: the dataset is not found, not readable, or not fit for the task.
    """
    source = open_dataset(name, config)
    name = name if isinstance(name, str) else ", ".join(name.values())
    if "train" not in source.splits:
        raise DataError(f"dataset {name!r} has no train split; its splits: {', '.join(source.splits)}")
    columns = find_columns(source.splits["train"], task, image=image_column, text=text_columns, label=label_column)
    notes: list[str] = []
    rows = {split: source.splits[split] for split in ("train", "validation", "test") if split in source.splits}
    for split, table in rows.items():
        if len(table) == 0:
            raise DataError(f"the {split} split of dataset {name!r} is empty")
    if columns.image is not None:
        rows = {split: _as_images(table, columns.image, source.folder) for split, table in rows.items()}

    labels: dict[str, list[int]] = {}
    label_names: list[str] = []
    if columns.label is not None:
        labels, label_names = read_labels(rows, columns.label)
        rows = {split: table for split, table in rows.items() if split in labels}
    splits = {split: Split(split, table, labels.get(split)) for split, table in rows.items()}

    train = splits["train"]
    held_out = splits.get("validation") or splits.get("test")
    if held_out is None:
        train, held_out = hold_out(train, HOLDOUT_FRACTION, seed)
        if len(held_out) == 0:
            raise DataError(f"dataset {name!r} has {len(train)} rows: too few to hold any out for evaluation")
        how = "stratified, " if columns.label is not None else ""
        notes.append(
            f"no evaluation split: {len(held_out)} of {len(train) + len(held_out)} training rows held out "
            f"({HOLDOUT_FRACTION:.0%}, {how}seed {seed})"
        )
    return Data(
        name=name,
        columns=columns,
        train=_sample(train, max_train_samples, seed),
        eval=_sample(held_out, max_eval_samples, seed),
        label_names=label_names,
        glyphs=name in GLYPHS,
        notes=notes,
    )


def _sample(split: Split, limit: int | None, seed: int) -> Split:
    """At most `limit` rows, drawn at random: files are often sorted by class."""
    if limit is None or limit >= len(split):
        return split
    return split.select(sorted(np.random.default_rng(seed).permutation(len(split))[:limit].tolist()))


def _as_images(rows: datasets.Dataset, column: str, folder: Path | None) -> datasets.Dataset:
    """Gives the column the Image type, so that a row decodes when it is read."""
    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        return rows
    if is_image_struct(feature):
        return rows.cast_column(column, datasets.Image())
    if folder is not None:
        paths = [str(folder / path) for path in rows.select_columns(column).to_dict()[column]]
        rows = rows.remove_columns(column).add_column(column, paths)
    return rows.cast_column(column, datasets.Image())
