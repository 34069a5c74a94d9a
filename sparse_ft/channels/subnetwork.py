"""Running a model with a part of its channels, physically: the layers compute with small dense weights.

Before a forward pass the slices of the channels that are kept are taken out of every parameter, and put in its place;
the model's own code then runs, on fewer channels. Gradients go back through the taking, so that the full parameters
have them, zero wherever a channel was left out. Nothing is copied but weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparse_ft.masks.targets import unwrap
from sparse_ft.nn import compute_varying

from .units import Channels, slices_of


def take(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """The slices along the first and the second dimension; None takes all."""
    # Twice as fast as both indices at once.
    taken = tensor if rows is None else tensor.index_select(0, rows)
    return taken if columns is None else taken.index_select(1, columns)


def _index(rows: Tensor | None, columns: Tensor | None) -> Any:
    if rows is None:
        return slice(None) if columns is None else (slice(None), columns)
    return rows if columns is None else (rows[:, None], columns)


class _Take(torch.autograd.Function):
    """`take`, and back: the gradient is zero where nothing was taken."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, rows: Tensor | None, columns: Tensor | None, last: bool) -> Tensor:
        ctx.save_for_backward(rows, columns)
        ctx.shape, ctx.strides = tensor.shape, tensor.stride()
        taken = take(tensor, rows, columns)
        return taken.contiguous(memory_format=torch.channels_last) if last and taken.dim() == 4 else taken

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        rows, columns = ctx.saved_tensors
        # Strides of another layout would have the gradient copied as it accumulates and again by the optimizer.
        whole = torch.empty_strided(ctx.shape, ctx.strides, dtype=grad.dtype, device=grad.device).zero_()
        whole[_index(rows, columns)] = grad
        return whole, None, None, None


@dataclass
class _Taken:
    """A tensor of a module to be taken from; `store` is the dict of the module that has it."""

    store: dict[str, Tensor]
    key: str
    rows: Tensor | None
    columns: Tensor | None
    is_statistic: bool
    whole: Tensor | None = None  # while it is replaced

    def put(self, channels_last: bool) -> None:
        self.whole = self.store[self.key]
        self.store[self.key] = _Take.apply(self.whole, self.rows, self.columns, channels_last)

    def put_back(self, keep_statistics: bool) -> None:
        assert self.whole is not None
        small, self.store[self.key] = self.store[self.key], self.whole
        if self.is_statistic and keep_statistics and self.rows is not None:
            with torch.no_grad():
                self.whole.index_copy_(0, self.rows, small)
        self.whole = None


class SubNetwork:
    """A model with a part of its units.

    Args:
        model: also inside DistributedDataParallel.
        channels: its units.
        kept: bool by unit. Every layer has to keep a channel, see `Channels.with_floor`.
        native: compute with what minds no odd or ever other numbers of channels, see `sparse_ft.nn.compute_varying`.
    """

    def __init__(self, model: nn.Module, channels: Channels, kept: Tensor, *, native: bool = False):
        modules = dict(unwrap(model).named_modules())
        self._modules = list(modules.values())
        self._taken: list[_Taken] = []
        indices: dict[int, Tensor | None] = {}  # places share their tensors of units

        def index(units: Tensor | None) -> Tensor | None:
            if units is None:
                return None
            if id(units) not in indices:
                indices[id(units)] = chosen(units, kept)
            return indices[id(units)]

        for place in channels.places:
            rows, columns = index(place.rows), index(place.columns)
            if rows is None and columns is None:
                continue
            module = modules[place.layer]
            store: Any = module._parameters if place.key in module._parameters else module._buffers
            self._taken.append(_Taken(store, place.key, rows, columns, place.kind == "statistic"))
        self._groups = [(modules[name], int(slices_of(units, kept).sum())) for name, units in channels.groups.items()]
        self._aside: list[tuple[Any, str, Any]] = []
        self._classes: list[tuple[nn.Module, type]] = []
        self._keep_statistics = True
        self._native = native
        self._entered = False

    def enter(self, *, keep_statistics: bool = True) -> None:
        """From now on the model has the kept channels only.

        Args:
            keep_statistics: whether norms may learn from what they see; only the statistics of kept channels change.
        """
        if self._entered:
            raise RuntimeError("the model runs with a part of its channels already")
        self._entered, self._keep_statistics = True, keep_statistics
        if not keep_statistics:
            for module in self._modules:
                for key, buffer in module._buffers.items():
                    if buffer is not None:
                        self._aside.append((module._buffers, key, buffer))
                        module._buffers[key] = buffer.clone()
        for taken in self._taken:
            taken.put(channels_last=not self._native)  # in which oneDNN minds odd numbers of channels less
        for module, groups in self._groups:
            self._set(module, "groups", groups)
        if self._native:
            for module in self._modules:
                self._classes.append((module, type(module)))
                compute_varying(module)
                if isinstance(module, nn.BatchNorm2d) and module.weight is not None:
                    self._set(module, "num_features", len(module.weight))  # which native norms go by

    def _set(self, module: nn.Module, name: str, value: int) -> None:
        self._aside.append((vars(module), name, getattr(module, name)))
        setattr(module, name, value)

    def leave(self) -> None:
        """The model has all of its channels again."""
        for taken in reversed(self._taken):
            taken.put_back(self._keep_statistics)
        for store, key, value in reversed(self._aside):
            store[key] = value
        self._aside.clear()
        for module, kind in self._classes:
            module.__class__ = kind
        self._classes.clear()
        self._entered = False

    @contextmanager
    def active(self, *, keep_statistics: bool = True) -> Iterator[None]:
        """Inside, the model has the kept channels only; see `enter`."""
        self.enter(keep_statistics=keep_statistics)
        try:
            yield
        finally:
            self.leave()


def chosen(units: Tensor, kept: Tensor) -> Tensor | None:
    """Indices of the slices to keep, of their units; None for all."""
    stays = slices_of(units, kept)
    return None if bool(stays.all()) else stays.nonzero().flatten()
