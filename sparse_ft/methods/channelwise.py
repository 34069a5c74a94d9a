"""What methods share that leave whole channels out: the model runs, and trains, physically smaller.

The units of the model (channels that can only be left out together, see `sparse_ft.channels`) are found with the
first batch that it is given. From then on each forward pass computes with the channels that the method keeps.
"""

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.channels import ChannelError, Channels, SubNetwork, analyze_channels
from sparse_ft.optimizer_state import clear_pruned

from .pruning import MaskedTargets
from .training import Training

logger = logging.getLogger(__name__)


class ChannelWise(MaskedTargets):
    """A modifier under which the model runs without some of its units; sub-classes say which (`kept_units`).

    Attributes:
        channels: the units of the model, from its first forward pass in the time of the modifier on; None before, and
            if the model cannot run with a part of its channels.
    """

    channels: Channels | None = None
    _analyzed = False
    _running: SubNetwork | None = None
    _inside = False  # a forward pass of its own is under way
    _hooks: list[Any]

    @property
    def keeps_dense(self) -> bool:
        return not self._analyzed or self.channels is not None

    def kept_units(self, training: Training) -> Tensor | None:
        """bool by unit: what the coming forward pass is to have; None for everything."""
        raise NotImplementedError

    def keeps_statistics(self) -> bool:
        """Whether norms may learn from the coming forward pass."""
        return True

    def runs_native(self, batch: Any) -> bool:
        """Whether convolutions with few channels compute on the native kernels."""
        return False

    def units_found(self, training: Training) -> None:
        """When the units are known, before the first forward pass without some of them."""

    def cannot_run(self, training: Training, error: ChannelError) -> None:
        """When the model cannot run without some of its channels."""
        raise error

    def at_work(self, training: Training) -> bool:
        """Whether the forward passes of the coming step are in the time of the modifier, or after it."""
        event = training.clock.event(self.timing, self.phase, training.step)
        return self.phase.started or self.phase.ended or event.starts

    def listen(self, training: Training) -> None:
        def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._inside and self.at_work(training):
                self.enter(training, model, _as_batch(model, args, kwargs))

        def after(model: nn.Module, args: Any, output: Any) -> None:
            if not self._inside:
                self._leave()

        model = training.model
        self._hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after, always_call=True),
        ]

    def enter(self, training: Training, model: nn.Module, batch: Any) -> None:
        """Before a forward pass on a batch."""
        if not self._analyzed:
            self._analyze(training, model, batch)
        kept = None if self.channels is None else self.kept_units(training)
        if kept is not None and self.channels is not None:
            self._running = SubNetwork(model, self.channels, kept, native=self.runs_native(batch))
            self._running.enter(keep_statistics=model.training and self.keeps_statistics())

    def _leave(self) -> None:
        if self._running is not None:
            self._running.leave()
            self._running = None

    def _analyze(self, training: Training, model: nn.Module, batch: Any) -> None:
        self._inside = True
        try:
            self.channels = analyze_channels(model, batch)
        except ChannelError as error:
            self.cannot_run(training, error)
        finally:
            self._inside = False
        self._analyzed = True
        if self.channels is not None:
            self.units_found(training)

    @torch.no_grad()
    def silence(self, training: Training, gone: Tensor) -> None:
        """Makes units (bool by unit) dead, with their gradients and what the optimizer keeps of them."""
        assert self.channels is not None
        for place in self.channels.places:
            if place.kind != "statistic":
                parameter = training.model.get_parameter(place.name)
                rows = ~place.made_by(~gone)
                parameter[rows] = 0
                if parameter.grad is not None:
                    parameter.grad[rows] = 0  # of a pass that still had them
                pruned = rows.view(-1, *[1] * (parameter.dim() - 1)).expand_as(parameter)
                clear_pruned(training.optimizer, parameter, pruned)

    def stop_listening(self) -> None:
        for hook in getattr(self, "_hooks", []):
            hook.remove()
        self._hooks = []


def _as_batch(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Arguments of a call as a sequence, or all by name."""
    if not kwargs:
        return args
    if not args:
        return kwargs
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
