"""The channels of a model that can only be left out together."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

FIXED = -1


class ChannelError(ValueError):
    """The channels of a model cannot be told apart; one line says where and why."""


@dataclass(frozen=True)
class Place:
    """A parameter or buffer of a layer, and which units its slices belong to.

    Attributes:
        layer, key: name of the layer, and of the tensor in it ("weight", "bias", "running_mean" ...).
        kind: "weight" of a convolution or linear layer, its "bias", "affine" of a norm, or its "statistic".
        rows: unit of each slice along the first dimension, which makes the channel; -1 where it is fixed.
        columns: for weights the unit of each slice along the second dimension, which reads the channel; or None.
    """

    layer: str
    key: str
    kind: str
    rows: Tensor
    columns: Tensor | None = None

    @property
    def name(self) -> str:
        """In the state dict."""
        return f"{self.layer}.{self.key}" if self.layer else self.key

    def made_by(self, units: Tensor) -> Tensor:
        """bool by row: whether it is one of these units (bool by unit), or fixed."""
        return slices_of(self.rows, units)


def slices_of(places: Tensor, units: Tensor) -> Tensor:
    """bool by slice: whether it is one of these units (bool by unit), or fixed."""
    free = places != FIXED
    found = ~free
    found[free] = units[places[free]]
    return found


@dataclass(frozen=True)
class Channels:
    """The units of a model.

    Attributes:
        count: how many units there are.
        places: every tensor that has channels, in module order; units are counted in the order of their first layer.
        groups: of grouped convolutions, by layer name, the unit of each group.
    """

    count: int
    places: list[Place]
    groups: dict[str, Tensor] = field(default_factory=dict)

    def weights(self) -> Iterator[Place]:
        """The weights of convolutions and linear layers."""
        return (place for place in self.places if place.kind == "weight")

    def sizes(self, names: Collection[str]) -> Tensor:
        """int by unit: how many rows of the weights of these names make it; 0 if any other weight makes it, too."""
        sizes = torch.zeros(self.count, dtype=torch.long)
        others = torch.zeros(self.count, dtype=torch.bool)
        for place in self.weights():
            units = place.rows[place.rows != FIXED]
            if place.name in names:
                sizes += torch.bincount(units, minlength=self.count)
            else:
                others[units] = True
        return sizes.masked_fill(others, 0)

    def with_floor(self, kept: Tensor, least: int, rank: Tensor) -> Tensor:
        """`kept` (bool by unit) and as many more units as every layer needs to keep `least` channels, if it has them.

        Args:
            rank: by unit; the highest come first.
        """
        kept = kept.clone()
        for place in self.weights():
            stays = place.made_by(kept)
            missing = min(least, len(stays)) - int(stays.sum())
            if missing > 0:
                gone = place.rows[~stays]
                kept[gone[rank[gone].argsort(descending=True, stable=True)[:missing]]] = True
        return kept
