"""Which weights of a layer are in use under SWAT, and the pattern and values that its products compute with."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_ft.nn.conv import padding_of
from sparse_ft.ops import SparsePattern, native_reason
from sparse_ft.ops.pattern import flat_index
from sparse_ft.ops.thresholds import pattern_at_least

from . import budgets


class Geometry(NamedTuple):
    """A convolution's numbers; a linear layer is a 1x1 convolution of one position."""

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # top, left, bottom, right
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, module: nn.Conv2d | nn.Linear) -> "Geometry":
        if isinstance(module, nn.Linear):
            return cls((*module.weight.shape, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
        shape = tuple(module.weight.shape)
        return cls(shape, tuple(module.stride), padding_of(module), tuple(module.dilation), module.groups)

    @property
    def flat(self) -> bool:
        """Whether positions are alike."""
        return self.weight_shape[2:] == self.stride == (1, 1) and not any(self.padding)

    def of_input(self, shape: tuple[int, ...]) -> "Geometry":
        """The same for an input of that shape: a kernel that covers all of it has one position and no taps."""
        o, i, kh, kw = self.weight_shape
        if shape[2:] != (kh, kw) or any(self.padding) or self.dilation != (1, 1) or self.groups != 1:
            return self
        return Geometry((o, i * kh * kw, 1, 1), (1, 1), self.padding, (1, 1), 1)

    def of_pattern(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding[:2], "dilation": self.dilation, "groups": self.groups}


@functools.lru_cache(maxsize=1024)
def reached_taps(geometry: Geometry, height: int, width: int) -> Tensor | None:
    """uint8 by kernel position, 0 for those that read padding alone at an input of that size; None: there are none."""
    axes = []
    for axis, size in enumerate((height, width)):
        taps, step, hop = geometry.weight_shape[2 + axis], geometry.stride[axis], geometry.dilation[axis]
        before, after = geometry.padding[axis], geometry.padding[axis + 2]
        outputs = (size + before + after - hop * (taps - 1) - 1) // step + 1
        axes.append([any(0 <= o * step + tap * hop - before < size for o in range(outputs)) for tap in range(taps)])
    if all(axes[0]) and all(axes[1]):
        return None
    return torch.tensor([down and across for down in axes[0] for across in axes[1]], dtype=torch.uint8)


class Operands(NamedTuple):
    """What products need of a layer's weights.

    Attributes:
        pattern: index tensors of the weights in use that meet an input, as of a SparsePattern.
        values: of these.
        shape: of the dense weight, in four dimensions.
        columns: of the dense weight, as many as meet an input.
    """

    pattern: list[Tensor]
    values: Tensor
    shape: tuple[int, ...]
    columns: int

    def places(self) -> Tensor:
        """Where the values are in the flat dense weight."""
        return flat_index(self.pattern[0], self.pattern[1], self.shape)

    def dense(self) -> Tensor:
        """The weight with zeros wherever it is not in use."""
        dense = self.values.new_zeros(math.prod(self.shape))
        return dense.index_copy_(0, self.places(), self.values).view(self.shape)


class Active:
    """Which weights of a layer are in use.

    Those of a mask stand; those whose magnitude reaches a threshold are others once the weights have changed. With
    both, the mask is for the weights as they are now: of equal magnitudes it may leave some out.

    A weight counts as changed if its version is another one, which torch's fused optimizers do not see to, or if
    `changed` says so.

    Attributes:
        threshold: None if there is none.
        used: what `operands` gave last, or None.
    """

    def __init__(
        self, geometry: Geometry, weight: Tensor, *, mask: Tensor | None = None, threshold: float | None = None,
        structure: str = "unstructured",
    ):  # fmt: skip
        self.geometry, self.threshold, self.structure = geometry, threshold, structure
        self.used: Operands | None = None
        self._mask, self._chosen_for = mask, _version(weight)
        self._used_for = self._chosen_for
        self._taps: Tensor | None = None
        self._index: Tensor | None = None  # of the values in the flat weight, where a mask stands

    def changed(self) -> None:
        """The weight has been written to."""
        self._chosen_for = self._used_for = _UNKNOWN

    def follows(self, weight: Tensor) -> bool:
        """Whether the threshold decides."""
        return self._mask is None or (self.threshold is not None and _version(weight) != self._chosen_for)

    def mask(self, weight: Tensor) -> Tensor:
        """bool, of the weight's shape."""
        if not self.follows(weight):
            assert self._mask is not None
            return self._mask
        assert self.threshold is not None
        return budgets.at_least(weight, self.threshold, self.structure)

    def operands(self, weight: Tensor, height: int, width: int) -> Operands:
        """For inputs of that size. What was given last is given again, unless the weight or the size is another."""
        native = native_reason(weights=(weight,)) is None
        taps = reached_taps(self.geometry, height, width) if native else None
        version = _version(weight)
        if self.used is None or taps is not self._taps or self.follows(weight) and version != self._used_for:
            self.used, self._index = self._make(weight, taps, native), None
        elif version != self._used_for:  # the same weights, other values
            if self._index is None:
                self._index = self.used.places()
            values = weight.detach().reshape(-1).index_select(0, self._index)
            self.used = self.used._replace(values=values)
        self._used_for, self._taps = version, taps
        return self.used

    def _make(self, weight: Tensor, taps: Tensor | None, native: bool) -> Operands:
        g = self.geometry
        if native and self.structure == "unstructured" and self.follows(weight):
            assert self.threshold is not None
            pattern, values = pattern_at_least(
                weight.view(g.weight_shape), self.threshold, taps=taps, **g.of_pattern()
            )
        else:
            mask = self.mask(weight).view(g.weight_shape)
            if taps is not None:
                mask = mask & taps.view(g.weight_shape[2:]).bool()
            built, values = SparsePattern.build(weight.detach().view(g.weight_shape), mask, **g.of_pattern())
            pattern = built.tensors
        reached = g.weight_shape[2] * g.weight_shape[3] if taps is None else int(taps.sum())
        return Operands(pattern, values, g.weight_shape, g.weight_shape[1] * reached)


_UNKNOWN = (0, -1)


def _version(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), weight._version
