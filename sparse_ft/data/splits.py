"""Splits: rows with their class indices, and the stratified hold-out."""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np


@dataclass(frozen=True)
class Split:
    """Rows of one split and, for classification, the class index of each row.

    Attributes:
        name: `train`, `validation` or `test`, as the dataset calls it.
        rows: the rows as stored (images not yet decoded).
        labels: one class index per row, or None where the task has no labels.
    """

    name: str
    rows: datasets.Dataset
    labels: list[int] | None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, indices: Sequence[int], name: str | None = None) -> "Split":
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return Split(name or self.name, self.rows.select(indices), labels)


def stratified_holdout(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Divides row numbers into (kept, held out), holding out `fraction` of each class.

    A class with at least two rows keeps one and gives one; a class with a single row is kept. Both lists are sorted
    and depend only on the arguments.
    """
    generator = np.random.default_rng(seed)
    values = np.asarray(labels)
    held_out: list[int] = []
    for label in np.unique(values):
        members = generator.permutation(np.flatnonzero(values == label))
        count = min(max(round(len(members) * fraction), 1), len(members) - 1)
        held_out.extend(members[:count].tolist())
    chosen = set(held_out)
    return [i for i in range(len(values)) if i not in chosen], sorted(held_out)


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Holds out `fraction` of a split (stratified where it has labels) as its `validation` split."""
    kept, held_out = stratified_holdout(split.labels or [0] * len(split), fraction, seed)
    return split.select(kept), split.select(held_out, "validation")
