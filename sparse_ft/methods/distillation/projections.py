"""Linear maps from a model's features to a teacher's, trained beside the model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.processes import is_parallel


class Projections:
    """Maps by place, and the optimizer that moves them.

    They are no part of the model: neither its checkpoints nor its optimizer know of them.

    Attributes:
        maps: (teacher's features, model's features) by place.
    """

    def __init__(self) -> None:
        self.maps: dict[str, nn.Parameter] = {}
        self._optimizer: torch.optim.Adam | None = None

    def add(self, place: str, features: int, wanted: int, like: Tensor) -> None:
        """Makes a map that keeps the mean square of features that are independent, the same in every process."""
        generator = torch.Generator().manual_seed(len(self.maps))
        values = torch.randn(wanted, features, generator=generator) / features**0.5
        self._hold(place, values.to(like.device, like.dtype))

    def _hold(self, place: str, values: Tensor) -> None:
        parameter = self.maps[place] = nn.Parameter(values)
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam([parameter])
        else:
            self._optimizer.add_param_group({"params": [parameter]})

    def step(self, learning_rate: float) -> None:
        """Moves the maps along their gradients, averaged over all processes."""
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for parameter in self.maps.values():
            if is_parallel() and parameter.grad is not None:
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad.div_(torch.distributed.get_world_size())
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The maps and the optimizer's state of each, by place."""
        return {
            place: {"map": parameter.detach(), **(self._optimizer.state[parameter] if self._optimizer else {})}
            for place, parameter in self.maps.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        for place, entry in state.items():
            self._hold(place, entry["map"].clone())
            assert self._optimizer is not None
            moments = {name: value.clone() for name, value in entry.items() if name != "map"}
            self._optimizer.state[self.maps[place]] = moments
