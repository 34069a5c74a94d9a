"""FBPS: training with a part of the channels from the first step on, forward and backward."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.channels.tracing import tensors_of
from sparse_ft.nn import suits_varying

from ..base import Bounded, Forward
from ..channelwise import ChannelWise
from ..clock import Clock
from ..fields import EPOCH, FLAG, NEVER, NOTHING, choice, either, field, integer, number
from ..probabilities import Learned, clip, cosine, generator, kept_share
from ..pruning import SPARSITY
from ..registry import register
from ..targets import TARGETS, Target, find_targets, named_targets
from ..training import Training
from .estimator import draw, policy_gradient

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ONE = "units"  # name of the probabilities in what Learned keeps


@register("FBPSModifier")
class FBPS(ChannelWise, Bounded):
    """Trains randomly drawn sub-networks of whole channels, and learns which channels to draw (VR-PGE).

    Every step draws two masks over the channels. One sub-network is trained on the batch, forward and backward with
    its channels only; the loss of the other is the baseline for the policy gradient by which Adam moves the
    probabilities, which are then projected onto their budget. At the end the best of several drawn masks stays, and
    what follows trains that sub-network. Channels that a model adds, or that a grouped convolution keeps together, are
    drawn together. The session needs `again`, see `SparseSession.loss`.
    """

    source = "Zhou et al. 2021, arXiv 2111.05685"
    completes = True
    changes_loss = True
    needs_training = True

    params: Any = field(
        either(TARGETS, NOTHING), None,
        doc="The weights whose output channels are drawn; those of all convolutions if not given. What the model puts "
        "out always stays whole.",
    )  # fmt: skip
    final_sparsity: float = field(SPARSITY, unit="fraction of channels", doc="Channels that are left out.")
    start_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="When it begins; -1 for at once.")
    end_epoch: float = field(EPOCH, unit="epochs", doc="When the mask is fixed.")
    prune_from: float = field(number(0, 1), 0.0, unit="of its time", doc="When the budget begins to fall from all.")
    prune_until: float = field(
        number(0, 1), 0.0, unit="of its time",
        doc="When the budget is that of the end; 0 for all the time, as published. For trained models, later.",
    )  # fmt: skip
    learning_rate: float = field(
        number(0, above=True), 12e-3, doc="Of the probabilities (Adam); falls to 0 on a cosine."
    )
    backward: str = field(
        choice("one", "both"), "one",
        doc="Train the sub-network of one mask (the paper: 2 forward passes, 1 backward), or of both (2 and 2).",
    )  # fmt: skip
    init: str = field(
        choice("constant", "magnitude"), "constant",
        doc="Probabilities at the start: all alike, or by the size of a channel's weights, for trained models.",
    )  # fmt: skip
    min_channels: int = field(integer(1), 1, unit="channels", doc="That every layer keeps.")
    min_probability: float = field(
        number(0, 0.5), 0.0, doc="That no channel falls below: at 0 a channel that is out stays out."
    )
    max_grad_norm: float = field(number(0, above=True), 3.0, doc="Of the estimate; longer ones are shortened.")
    candidates: int = field(
        integer(0), 10, unit="masks",
        doc="From which the last mask is chosen by its loss on training batches, which needs a grad_sampler; 0 takes "
        "the likeliest channels.",
    )  # fmt: skip
    candidate_batches: int = field(integer(1), 8, unit="batches", doc="For the loss of a candidate.")
    native: bool = field(
        FLAG, True,
        doc="Compute in forms that mind no odd and no changing numbers of channels: float32, 16 images and more.",
    )  # fmt: skip
    seed: int = field(integer(0), 0, doc="Of the masks.")

    _learned: Learned | None = None
    _final: Tensor | None = None  # the mask that stays
    _candidate: Tensor | None = None  # the mask that is being tried
    _second = False  # the pass under way is that of the second mask
    _difference = 0.0  # of the losses of a step's two masks
    _batches = 0

    def check(self) -> None:
        super().check()
        if self.params == []:
            raise self.wrong("params", "must name at least one weight")
        if self.prune_from > self.prune_until or self.prune_from == self.prune_until != 0:
            raise self.wrong("prune_until", f"must be after prune_from ({self.prune_from:g}), or both 0")
        if self.min_probability > 1 - self.final_sparsity:
            raise self.wrong(
                "min_probability", f"must be at most the share of channels that stays ({1 - self.final_sparsity:g})"
            )

    def find_targets(self, model: nn.Module) -> dict[str, Target]:
        if self.params is not None:
            return super().find_targets(model)
        ignored = find_targets(model, self.ignore) if self.ignore else {}
        found = {
            name: target
            for name, target in named_targets(model).items()
            if isinstance(target.module, _CONVOLUTIONS) and name not in ignored
        }
        if not found:
            raise self.wrong("params", "the model has no convolutions: name the weights")
        return found

    # Units and probabilities

    def units_found(self, training: Training) -> None:
        assert self.channels is not None
        self.attach(training)
        training.refuse_native(self.targets)
        self._sizes = self.channels.sizes(self.targets.keys())
        self._drawn = self._sizes > 0
        if not bool(self._drawn.any()):
            raise self.wrong("params", "none of these weights has output channels that the model can run without")
        if self._learned is None:
            self._learned = Learned({_ONE: self._initial(training)})
            self._project(training)
        elif len(self._probabilities) != int(self._drawn.sum()):
            theirs, ours = len(self._probabilities), int(self._drawn.sum())
            raise ValueError(f"the state has probabilities of {theirs} units, the model has {ours}")

    def _initial(self, training: Training) -> Tensor:
        assert self.channels is not None
        share = self._kept_share(training.clock, training.step)
        if self.init == "constant":
            return torch.full((int(self._drawn.sum()),), share)
        size, rows = torch.zeros(2, self.channels.count)
        for place in self.channels.weights():
            if place.name in self.targets:
                norms = training.model.get_parameter(place.name).detach().float().flatten(1).norm(dim=1).cpu()
                free = place.rows >= 0
                size.index_add_(0, place.rows[free], norms[free] / norms.mean().clamp(min=1e-12))
                rows.index_add_(0, place.rows[free], torch.ones(int(free.sum())))
        return share * (size / rows.clamp(min=1))[self._drawn]

    @property
    def _probabilities(self) -> Tensor:
        assert self._learned is not None
        return self._learned.values[_ONE]

    def _kept_share(self, clock: Clock, step: int) -> float:
        return kept_share(clock.progress(self.timing, step), self.final_sparsity, self.prune_from, self.prune_until)

    def budget(self, training: Training) -> int:
        """How many channels are kept now."""
        return round(self._kept_share(training.clock, training.step) * int(self._sizes.sum()))

    def _project(self, training: Training) -> None:
        assert self._learned is not None
        self._learned.project(self.budget(training), self._sizes[self._drawn], self.min_probability)

    def probabilities(self) -> Tensor:
        """By unit; 1 for units that are not drawn."""
        return self._everywhere(self._probabilities, 1.0)

    # Masks

    def _mask(self, training: Training, number: int) -> Tensor:
        """The drawn mask `number` of the step, by unit that is drawn."""
        return draw(self._probabilities, generator(self.seed, training.step, number))

    def _units(self, mask: Tensor) -> Tensor:
        """The mask for all units, with the channels that every layer keeps."""
        assert self.channels is not None
        return self.channels.with_floor(self._everywhere(mask, True), self.min_channels, self.probabilities())

    def _everywhere(self, values: Tensor, others: float) -> Tensor:
        """Values of the units that are drawn, for all units."""
        everything = torch.full((len(self._drawn),), others, dtype=values.dtype)
        everything[self._drawn] = values
        return everything

    def _within_budget(self, training: Training, mask: Tensor) -> Tensor:
        """The units of a mask, cut or filled up to the budget: first those that every layer keeps, then those of the
        mask, by their probabilities; equal ones in random order."""
        assert self.channels is not None
        rank = self._probabilities.double() + 2 * mask.double()
        floor = self.channels.with_floor(~self._drawn, self.min_channels, self._everywhere(rank, 0.0))
        rank += 4 * floor[self._drawn].double()
        order = torch.randperm(len(mask), generator=generator(self.seed, 0, 0))
        order = order[rank[order].argsort(descending=True, stable=True)]
        chosen = torch.zeros_like(mask)
        chosen[order] = self._sizes[self._drawn][order].cumsum(0) <= self.budget(training)
        return floor | self._everywhere(chosen, True)

    def _likeliest(self, training: Training) -> Tensor:
        return self._within_budget(training, torch.zeros_like(self._probabilities, dtype=torch.bool))

    def kept_units(self, training: Training) -> Tensor | None:
        if self._candidate is not None:
            return self._candidate
        if self._final is not None:
            return self._final
        if not training.model.training:
            return self._likeliest(training)
        return self._units(self._mask(training, int(self._second)))

    def runs_native(self, batch: Any) -> bool:
        return self.native and any(map(suits_varying, tensors_of(batch)))

    def keeps_statistics(self) -> bool:
        return not self._second and self._candidate is None

    # Steps

    def listen(self, training: Training) -> None:
        if self.candidates and training.grad_sampler is None:
            raise self.wrong(
                "candidates", "needs losses of fresh batches: give the session a grad_sampler, or set it to 0"
            )
        super().listen(training)

    def enter(self, training: Training, model: nn.Module, batch: Any) -> None:
        if not self._second:
            self._random_state = torch.get_rng_state()
        super().enter(training, model, batch)

    def loss(self, training: Training, loss: Tensor, forward: Forward) -> Tensor:
        after = torch.get_rng_state()
        torch.set_rng_state(self._random_state)  # the same noise for both
        self._second = True
        try:
            with torch.set_grad_enabled(self.backward == "both"):
                other = forward.need_again()
        finally:
            self._second = False
            torch.set_rng_state(after)
        difference = float(forward.loss.detach()) - float(other.detach())
        self._difference += difference
        self._batches += 1
        self._averages = forward.scale == 1.0
        return loss if self.backward == "one" else loss + (other - forward.loss) / 2

    def before_step(self, training: Training) -> None:
        ends = training.clock.event(self.timing, self.phase, training.step).ends
        if self._batches == 0:
            if ends:
                return
            raise ValueError("was given no losses: pass every loss of the training through session.loss(..., again=f)")
        assert self._learned is not None
        difference = self._difference / self._batches if self._averages else self._difference
        difference = float(training.mean(torch.tensor(difference)))
        self._difference, self._batches = 0.0, 0
        first, second = (self._mask(training, number) for number in (0, 1))
        estimate = {_ONE: policy_gradient(difference, first, second, self._probabilities)}
        rate = cosine(self.learning_rate, training.clock.progress(self.timing, training.step))
        self._learned.step(clip(estimate, self.max_grad_norm), rate)
        self._project(training)
        training.share(self._probabilities)

    @torch.no_grad()
    def end(self, training: Training) -> None:
        assert self.channels is not None
        kept = training.agree({_ONE: self._best(training)})[_ONE]
        self._final = kept
        self.silence(training, ~kept)
        training.masks.hold(self.owner, self.targets, self._weight_masks(kept))

    def _best(self, training: Training) -> Tensor:
        if not self.candidates:
            return self._likeliest(training)
        sampler = training.grad_sampler
        assert sampler is not None
        found = [self._likeliest(training)]
        for draws in range(2, self.candidates + 1):
            found.append(self._within_budget(training, self._mask(training, draws)))
        losses = []
        for candidate in found:
            self._candidate = candidate
            try:
                batches = [float(loss) for loss in sampler(self.candidate_batches, self.seed, None)]
            finally:
                self._candidate = None
            losses.append(sum(batches) / len(batches))
        means = training.mean(torch.tensor(losses))
        return found[int(means.argmin())]

    def _weight_masks(self, kept: Tensor) -> dict[str, Tensor]:
        assert self.channels is not None
        masks = {}
        for place in self.channels.weights():
            if place.name in self.targets:
                shape = self.targets[place.name].parameter.shape
                masks[place.name] = place.made_by(kept).view(-1, *[1] * (len(shape) - 1)).expand(shape).clone()
        return masks

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {} if self._learned is None else {"learned": self._learned.state_dict()}
        return state if self._final is None else state | {"final": self._final}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._learned = Learned.of_state(state["learned"]) if "learned" in state else None
        self._final = state["final"].bool() if "final" in state else None

    def preview(self, clock: Clock, step: int) -> dict[str, float]:
        return {"sparsity": 1 - self._kept_share(clock, step)}

    def unfinished(self, training: Training) -> str:
        return f"the mask is due at epoch {self.end_epoch:g}, all channels are still there"
