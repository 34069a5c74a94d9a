"""What the config.json of a stranger may ask for, measured by the weights that come with it.

A config of a hundred bytes can describe a model of a billion layers. So models are built under a budget: a few times
the tensors and numbers that the weight files hold, which is ample for tied weights and new classifiers.
"""

import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from .errors import ModelError
from .foreign import read_index
from .header import open_safetensors

_SPARE_NUMBERS = 2**26  # 256 MB in float32: a new classifier, position tables
_SPARE_PARTS = 20_000
_MOST_LAYERS, _MOST_LABELS, _MOST_BYTES = 10_000, 1_000_000, 64 * 2**20
_LAYERS = re.compile(r"(?!.*(size|dim|vocab|token)).*(layer|depth|blocks|stages)", re.I)
_LABELS = re.compile(r".*(labels|classes)", re.I)
_TABLES = ("id2label", "label2id")  # their keys are names that people give


@dataclass(frozen=True)
class Budget:
    """Most parts (modules, parameters, buffers) and most numbers in them that a model may be built of."""

    parts: int
    numbers: int

    @classmethod
    def of_tensors(cls, sizes: Iterable[int]) -> "Budget":
        sizes = list(sizes)
        return cls(_SPARE_PARTS + 40 * len(sizes), _SPARE_NUMBERS + 4 * sum(sizes))

    @classmethod
    def of_folder(cls, folder: Path) -> "Budget":
        """For a folder with dense weights, from the headers of its files.

        Raises:
            ModelError: A file is damaged or missing.
        """
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        files = [single] if single.is_file() else [folder / name for name in sorted(set(read_index(index).values()))]
        sizes: list[int] = []
        for path in files:
            try:
                with open_safetensors(path) as file:
                    sizes += [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]
            except (ValueError, OSError) as error:
                raise ModelError(str(error)) from error
        return cls.of_tensors(sizes)

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """While the block runs, this thread builds no model beyond the budget.

        The count is taken where a module registers its parts, which is before it fills them with numbers.

        Raises:
            ModelError: out of the constructor that goes beyond it.
        """
        thread = threading.get_ident()
        parts = numbers = 0

        def count(module: nn.Module, name: str, part: nn.Module | Tensor | None) -> None:
            nonlocal parts, numbers
            if part is None or threading.get_ident() != thread:
                return
            parts += 1
            numbers += part.numel() if isinstance(part, Tensor) else 0
            if parts > self.parts or numbers > self.numbers:
                raise ModelError(
                    "config.json describes a model many times larger than the weights that come with it "
                    f"(more than {self.numbers if numbers > self.numbers else self.parts:,} "
                    f"{'numbers' if numbers > self.numbers else 'parts'})"
                )

        handles = [
            hooks.register_module_parameter_registration_hook(count),
            hooks.register_module_buffer_registration_hook(count),
            hooks.register_module_module_registration_hook(count),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse counts of layers and classes that no model has: libraries make lists of them before any module.

    Raises:
        ModelError: An entry is too large; the message names it.
    """
    open_entries: list[tuple[str, Any]] = list(config.items())
    while open_entries:
        name, value = open_entries.pop()
        if name in _TABLES:
            continue
        if isinstance(value, Mapping):
            open_entries += value.items()
        elif isinstance(value, list):
            open_entries += [(name, each) for each in value]
        elif isinstance(value, int | float):
            for kind, most in ((_LAYERS, _MOST_LAYERS), (_LABELS, _MOST_LABELS)):
                if kind.match(str(name)) and value > most:
                    raise ModelError(f"{where}: {name!r:.60} is {value!r:.30}, more than any model has ({most})")


def check_file_size(path: Path) -> None:
    """Refuse JSON files of a size that no configuration has.

    Raises:
        ModelError: The file is too large.
    """
    if path.stat().st_size > _MOST_BYTES:
        raise ModelError(f"{path} is larger than {_MOST_BYTES >> 20} MiB, which no configuration is")
