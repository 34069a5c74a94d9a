"""What a case is."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """threads: of torch and the native core; rounds: timed runs of each variant."""

    threads: int
    rounds: int


@dataclass(frozen=True)
class Case:
    """Something to measure; `run` gives figures that JSON can hold."""

    name: str
    run: Callable[[Settings], dict]
