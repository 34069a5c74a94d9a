"""Taking channels out of a model for good, and putting zeros in their place again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.masks.targets import unwrap
from sparse_ft.randomness import preserved_random_state
from sparse_ft.steps import call
from sparse_ft.tables import format_table

from .analysis import analyze_channels, evaluating, same_outputs
from .subnetwork import chosen, take
from .tracing import tensors_of
from .units import FIXED, ChannelError, Channels, slices_of

_RECORD = "_sparse_ft_removed"  # attribute of a model without its dead channels

# What layers say of their size, by the dimension of their weight.
_SIZES = {0: ("out_channels", "out_features", "num_features"), 1: ("in_channels", "in_features")}


@dataclass(frozen=True)
class _Cut:
    """What was left of a tensor: indices along its first two dimensions (None for all), and its shape before."""

    rows: Tensor | None
    columns: Tensor | None
    shape: torch.Size


@dataclass(frozen=True)
class _Removed:
    """What `remove_channels` did to a model: cuts by layer and key, and how many groups convolutions had before."""

    cuts: dict[tuple[str, str], _Cut]
    groups: dict[str, int]


@dataclass(frozen=True)
class RemovalReport:
    """What `remove_channels` did; `str()` is a table.

    Attributes:
        shapes: of the weights that have become smaller: name, shape before and after.
        parameters_before, parameters_after: of the whole model.
    """

    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    parameters_before: int
    parameters_after: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "shapes": {name: {"before": list(before), "after": list(after)} for name, before, after in self.shapes},
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
        }

    def __str__(self) -> str:
        rows = [[name, _shape(before), _shape(after)] for name, before, after in self.shapes]
        kept = self.parameters_after / max(1, self.parameters_before)
        total = f"{self.parameters_before:,} parameters before, {self.parameters_after:,} after ({kept:.1%})"
        return (
            f"{format_table(['weight', 'before', 'after'], rows)}\n{total}" if rows else f"no dead channels; {total}"
        )


def _shape(sizes: tuple[int, ...]) -> str:
    return "×".join(map(str, sizes))


@torch.no_grad()
def dead_units(model: nn.Module, channels: Channels) -> Tensor:
    """bool by unit: whether it can be left out without any change.

    It can if every layer that makes it makes zeros (weights, biases and the norms on its way are zero there), or if no
    layer reads it (all weights that would are zero).
    """
    modules = dict(unwrap(model).named_modules())
    makes, reads, is_read = torch.zeros(3, channels.count, dtype=torch.bool)
    for place in channels.places:
        if place.kind == "statistic":
            continue
        tensor = modules[place.layer].get_parameter(place.key)
        _mark(makes, place.rows, tensor)
        if place.columns is not None:
            _mark(reads, place.columns, tensor.transpose(0, 1))
            is_read[place.columns[place.columns != FIXED]] = True
    for units in channels.groups.values():  # a grouped convolution reads what it makes
        reads[units[units != FIXED]] = True
    return ~makes | (is_read & ~reads)


def _mark(units: Tensor, places: Tensor, tensor: Tensor) -> None:
    """Sets the units of all slices along the first dimension that are not zero."""
    used = tensor.detach().ne(0).reshape(len(tensor), -1).any(1).cpu()
    units[places[used & (places != FIXED)]] = True


@torch.no_grad()
def silence(model: nn.Module, channels: Channels, units: Tensor) -> None:
    """Makes units (bool by unit) dead: zeroes the weights, biases and norms that make them."""
    modules = dict(unwrap(model).named_modules())
    for place in channels.places:
        if place.kind != "statistic":
            gone = ~slices_of(place.rows, ~units)
            modules[place.layer].get_parameter(place.key)[gone] = 0


def quiet_units(model: nn.Module, channels: Channels) -> Tensor:
    """bool by unit: whether all weights that make it are zero, whatever biases and norms add to that.

    A grouped convolution makes nothing of its own: it makes zeros of zeros.
    """
    makes = torch.zeros(channels.count, dtype=torch.bool)
    modules = dict(unwrap(model).named_modules())
    for place in channels.weights():
        if place.layer not in channels.groups:
            _mark(makes, place.rows, modules[place.layer].get_parameter(place.key))
    return ~makes


@torch.no_grad()
def remove_channels(model: nn.Module, inputs: Any, *, constants: bool = False) -> RemovalReport:
    """Takes dead channels out of a model, in place: the same outputs from smaller dense layers.

    A channel is dead if what makes it is zero (filters, biases and norms, as `StructuredPruningModifier` and
    `FBPSModifier` leave them), or if all weights that would read it are zero. Every layer keeps at least one. Make
    the optimizer afterwards: weights that become smaller are new parameters. `restore_channels` is the inverse.

    Args:
        model: a dense model; a native sparse layer has no channels to take out, see `sparse_ft.to_dense`.
        inputs: an input batch, as for `analyze_channels`.
        constants: also take out filters that are zero but whose biases or norms are not, so that they put out a
            constant. This changes the outputs; the model has to be trained on.

    Raises:
        ChannelError: the model cannot be analysed, or it is not the same afterwards; it is as before then.
    """
    model = unwrap(model)
    if hasattr(model, _RECORD):
        raise ChannelError("channels were removed already: call restore_channels first")
    channels = analyze_channels(model, inputs)
    if constants:
        silence(model, channels, quiet_units(model, channels))
    before, size = _outputs(model, inputs), _size(model)
    kept = channels.with_floor(~dead_units(model, channels), 1, torch.zeros(channels.count))
    cuts: dict[tuple[str, str], _Cut] = {}
    shapes = []
    for place in channels.places:
        cut = _Cut(
            chosen(place.rows, kept), None if place.columns is None else chosen(place.columns, kept), torch.Size()
        )
        if cut.rows is None and cut.columns is None:
            continue
        module = model.get_submodule(place.layer)
        whole = getattr(module, place.key)
        taken = take(whole, cut.rows, cut.columns)
        cuts[place.layer, place.key] = _Cut(cut.rows, cut.columns, whole.shape)
        _replace(module, place.key, taken)
        if place.kind == "weight":
            shapes.append((place.name, tuple(whole.shape), tuple(taken.shape)))
    if not cuts:
        return RemovalReport([], size, size)
    groups = {name: int(slices_of(units, kept).sum()) for name, units in channels.groups.items()}
    setattr(model, _RECORD, _Removed(cuts, _set_groups(model, groups)))
    if not same_outputs(_outputs(model, inputs), before):
        restore_channels(model)
        raise ChannelError(f"{type(model).__name__} would compute something else without its dead channels")
    return RemovalReport(shapes, size, _size(model))


def channels_removed(model: nn.Module) -> bool:
    """Whether `remove_channels` has made this model smaller."""
    return hasattr(unwrap(model), _RECORD)


@torch.no_grad()
def restore_channels(model: nn.Module) -> nn.Module:
    """The inverse of `remove_channels`, in place: what was taken out is there again, as zeros."""
    model = unwrap(model)
    removed: _Removed = getattr(model, _RECORD, _Removed({}, {}))
    for (layer, key), cut in removed.cuts.items():
        module = model.get_submodule(layer)
        values = getattr(module, key)
        for dim, index in ((1, cut.columns), (0, cut.rows)):
            if index is not None:
                shape = list(values.shape)
                shape[dim] = cut.shape[dim]
                fill = 1.0 if key == "running_var" else 0.0
                values = values.new_full(shape, fill).index_copy_(dim, index, values)
        _replace(module, key, values)
    _set_groups(model, removed.groups)
    if channels_removed(model):
        delattr(model, _RECORD)
    return model


def _replace(module: nn.Module, key: str, values: Tensor) -> None:
    old = getattr(module, key)
    if isinstance(old, nn.Parameter):
        setattr(module, key, nn.Parameter(values.detach().clone(), requires_grad=old.requires_grad))
    else:
        setattr(module, key, values)
    if key in ("weight", "running_mean"):
        for dim in range(min(2, values.dim())):
            for name in _SIZES[dim]:
                if hasattr(module, name):
                    setattr(module, name, values.shape[dim])


def _set_groups(model: nn.Module, groups: Mapping[str, int]) -> dict[str, int]:
    """Sets the groups of convolutions by layer name; returns what they were."""
    before = {}
    for name, count in groups.items():
        convolution: Any = model.get_submodule(name)
        before[name] = convolution.groups
        convolution.groups = count
        convolution.in_channels = convolution.weight.shape[1] * count
    return before


def _outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    with preserved_random_state(), evaluating(model):
        return tensors_of(call(model, inputs))


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
