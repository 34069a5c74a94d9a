"""From the values of a label column to class indices."""

from collections.abc import Mapping

import datasets

from .errors import DataError

UNLABELLED = -1  # what GLUE and its relatives write where the label of a test row is kept secret


def read_labels(splits: Mapping[str, datasets.Dataset], column: str) -> tuple[dict[str, list[int]], list[str]]:
    """Returns the class index of every row by split, and the class names.

    Classes that the dataset names keep their index; other values are sorted and counted from 0. A split in which no
    row is labelled is left out of the result.

    Raises:
        DataError: a row without a label, labels that are not classes, or fewer than two classes.
    """
    feature = splits["train"].features[column]
    values = {name: rows.select_columns(column).to_dict()[column] for name, rows in splits.items()}
    values = {name: column_values for name, column_values in values.items() if not _unlabelled(column_values)}
    if "train" not in values:
        raise DataError(f"the train split has no labels: every value of column {column!r} is empty or {UNLABELLED}")
    for name, column_values in values.items():
        _check(name, column, column_values)

    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
        for name in values:
            other = splits[name].features[column]
            if other != feature:
                raise DataError(
                    f"the classes of the {name} split are {_names(other)}, those of train {_names(feature)}"
                )
        indices = {name: [int(v) for v in column_values] for name, column_values in values.items()}
    else:
        classes = sorted(set(values["train"]))
        names = [str(c) for c in classes]
        index = {c: i for i, c in enumerate(classes)}
        for name, column_values in values.items():
            for row, value in enumerate(column_values):
                if value not in index:
                    raise DataError(
                        f"label {value!r} in row {row} of the {name} split does not occur in the train split"
                    )
        indices = {name: [index[v] for v in column_values] for name, column_values in values.items()}

    present = sorted(set(indices["train"]))
    if len(present) < 2:
        raise DataError(
            f"the train split has one class only ({names[present[0]]!r} in column {column!r}); a classifier needs two"
        )
    return indices, names


def _names(feature: object) -> str:
    return ", ".join(feature.names) if isinstance(feature, datasets.ClassLabel) else "not named"


def _unlabelled(values: list) -> bool:
    return all(v is None or v == UNLABELLED for v in values)


def _check(split: str, column: str, values: list) -> None:
    for row, value in enumerate(values):
        if value is None or value == UNLABELLED:
            raise DataError(f"row {row} of the {split} split has no label in column {column!r}")
        if not isinstance(value, (int, str)):
            raise DataError(
                f"column {column!r} holds {type(value).__name__} values such as {value!r} (row {row} of the {split} "
                "split); classes are whole numbers or strings"
            )
