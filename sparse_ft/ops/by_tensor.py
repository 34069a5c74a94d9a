"""What is kept for a tensor as long as that lives."""

import weakref
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class ByTensor(Generic[Value]):
    """Values by tensor, which is told from others by identity and not by its numbers.

    torch's `WeakIdKeyDictionary` does the same in 3 µs a look, several of which a layer's step would take.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref, Value]] = {}

    def get(self, tensor: Tensor) -> Value | None:
        """The tensor's value; None if there is none."""
        known = self._kept.get(id(tensor))
        # A number may have been given to another object since.
        return known[1] if known is not None and known[0]() is tensor else None

    def keep(self, tensor: Tensor, value: Value) -> None:
        """Remembers the tensor's value, in place of an earlier one."""
        number = id(tensor)

        def forget(reference: weakref.ref) -> None:
            known = self._kept.get(number)
            if known is not None and known[0] is reference:
                del self._kept[number]

        self._kept[number] = weakref.ref(tensor, forget), value

    def __len__(self) -> int:
        return len(self._kept)
