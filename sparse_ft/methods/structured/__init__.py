"""Whole filters and channels."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_ft.channels import ChannelError, dead_units, quiet_units
from sparse_ft.masks import masks_from_scores
from sparse_ft.masks.structures import from_canonical, to_canonical

from ..channelwise import ChannelWise
from ..fields import NOTHING, choice, either, field, listing
from ..pruning import GradualPruning
from ..registry import register
from ..targets import ALL_PRUNABLE, TARGETS, find_targets
from ..training import Training

logger = logging.getLogger(__name__)


@register("StructuredPruningModifier")
class StructuredPruning(ChannelWise, GradualPruning):
    """Gradual pruning of whole filters (output channels) or input channels, by the mean size of their weights.

    Weights of a group lose the same filters, those with the smallest mean over all of them: layers whose outputs are
    added, for one. A channel is gone when all filters that make it are pruned, or all weights that read it: its biases
    and norms become zero as well, unless the mask is to be let go, and the model is trained without it, physically
    smaller. The weights keep their shapes; `sparse_ft.remove_channels` makes them smaller after the training. A filter
    that is pruned while others still make its channel keeps its bias and norm.
    """

    source = "Li et al. 2017, arXiv 1608.08710"
    params: Any = field(TARGETS, ALL_PRUNABLE, doc="The weights.")
    mask_type: str = field(choice("filter", "channel"), "filter", doc="Output (filter) or input channels.")
    param_groups: Any = field(
        either(NOTHING, listing(TARGETS, "lists of names")), None, doc="Lists of weights that are pruned alike."
    )

    _kept: Tensor | None = None  # units that are left

    def attach(self, training: Training) -> None:
        super().attach(training)
        self._groups: list[list[str]] = []
        grouped: set[str] = set()
        for entries in self.param_groups or ():
            try:
                names = list(find_targets(training.model, entries))
            except ValueError as error:
                raise self.wrong("param_groups", str(error)) from None
            for name in names:
                if name not in self.targets or name in grouped:
                    problem = "is in two groups" if name in grouped else "is not among params"
                    raise self.wrong("param_groups", f"{name} {problem}")
            if len({self._channels(name) for name in names}) > 1:
                counts = ", ".join(f"{name} {self._channels(name)}" for name in names)
                raise self.wrong("param_groups", f"weights of a group must have as many {self.mask_type}s: {counts}")
            grouped.update(names)
            self._groups.append(names)
        self._groups += [[name] for name in self.targets if name not in grouped]

    def _channels(self, name: str) -> int:
        return self._canonical(name, self.targets[name].parameter).shape[0 if self.mask_type == "filter" else -1]

    def cannot_run(self, training: Training, error: ChannelError) -> None:
        logger.warning("%s: channels are masked, and the model is not made smaller: %s", self.type_name, error)

    def units_found(self, training: Training) -> None:
        self.attach(training)
        self._leave_out(training)

    def update(self, training: Training) -> None:
        super().update(training)
        self._leave_out(training)

    def _leave_out(self, training: Training) -> None:
        """Notes which units the model can run without now."""
        if self.channels is None or not self.leave_enabled:
            return
        none = torch.zeros(self.channels.count)
        ours = self.channels.sizes({*self.targets, *(f"{layer}.weight" for layer in self.channels.groups)}) > 0
        quiet = ~self.channels.with_floor(~(quiet_units(training.model, self.channels) & ours), 1, none)
        self.silence(training, quiet)
        kept = self.channels.with_floor(~dead_units(training.model, self.channels), 1, none)
        self._kept = None if bool(kept.all()) else kept

    def kept_units(self, training: Training) -> Tensor | None:
        return self._kept

    def scores(self, training: Training) -> dict[str, Tensor]:
        return self.sizes()

    def masks(self, training: Training, sparsities: Mapping[str, float]) -> dict[str, Tensor]:
        """A group is pruned as one matrix, in which its weights lie beside each other."""
        zeros = {name: target.parameter.detach() == 0 for name, target in self.targets.items()}
        masks = masks_from_scores(
            self._joined(self.scores(training)),
            sparsities,
            scope=self.budget_scope(),
            structure=self.mask_type,
            pruned=self._joined(zeros),
            transposed={group[0] for group in self._groups if len(group) == 1 and self.targets[group[0]].transposed},
        )
        return {name: mask for group in self._groups for name, mask in self._apart(group, masks[group[0]]).items()}

    def _joined(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One tensor for each group, under the name of its first weight."""
        return {
            group[0]: values[group[0]]
            if len(group) == 1
            else torch.cat([self._matrix(name, values[name]) for name in group], self._side)
            for group in self._groups
        }

    def _apart(self, group: list[str], mask: Tensor) -> dict[str, Tensor]:
        if len(group) == 1:
            return {group[0]: mask}
        canonical = {name: self._canonical(name, self.targets[name].parameter).shape for name in group}
        parts = mask.split([shape.numel() // mask.shape[1 - self._side] for shape in canonical.values()], self._side)
        return {
            name: from_canonical(part.reshape(shape), self.targets[name].transposed)
            for (name, shape), part in zip(canonical.items(), parts, strict=True)
        }

    @property
    def _side(self) -> int:
        """The dimension of a matrix along which weights of a group are joined."""
        return 1 if self.mask_type == "filter" else 0

    def _matrix(self, name: str, values: Tensor) -> Tensor:
        """Values of a weight as (filters, others) or (others, channels)."""
        canonical = self._canonical(name, values)
        return canonical.flatten(1) if self.mask_type == "filter" else canonical.flatten(0, -2)

    def _canonical(self, name: str, values: Tensor) -> Tensor:
        return to_canonical(values, self.targets[name].transposed)
