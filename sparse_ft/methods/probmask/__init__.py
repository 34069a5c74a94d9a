"""ProbMask: learning which weights to keep, by their probabilities."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Bounded, Forward
from ..clock import Clock
from ..fields import EPOCH, NEVER, field, integer, number
from ..probabilities import Learned, clip, cosine, generator, kept_share
from ..pruning import SPARSITY, MaskedTargets
from ..registry import register
from ..targets import ALL_PRUNABLE, TARGETS
from ..training import Training

_EDGE = 1e-6  # probabilities this near to 0 or 1 have no gradient
# Of a mask's logit: smaller masks would be denormal numbers, with which a convolution took 50 times as long.
_LOWEST = -60.0


@register("ProbMaskModifier")
class ProbMask(MaskedTargets, Bounded):
    """Learns a probability of being kept for every weight, under one budget, and the weights with it.

    Forward passes compute with w x m, m = sigmoid((logit(s) + logistic noise) / temperature): a soft mask that hardens
    as the temperature falls from 1 to 0.03. Gradients reach weights and probabilities through it; Adam moves the
    probabilities, and a projection keeps their sum within a budget that falls on a cubic curve. At the end the most
    probable weights stay. Weights, gradients and computing are dense until then. With two samples the session needs
    `again`, see `SparseSession.loss`.
    """

    source = "Zhou et al. 2021 (Effective sparsification of neural networks with global sparsity constraint, CVPR)"
    completes = True
    changes_loss = True
    needs_training = True
    dense_until_end = True

    params: Any = field(TARGETS, ALL_PRUNABLE, doc="The weights.")
    final_sparsity: float = field(SPARSITY, unit="fraction of zeros", doc="Sparsity at the end, of all together.")
    start_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="When it begins; -1 for at once.")
    end_epoch: float = field(EPOCH, unit="epochs", doc="When the mask is fixed.")
    prune_from: float = field(number(0, 1), 0.16, unit="of its time", doc="When the budget begins to fall.")
    prune_until: float = field(number(0, 1), 0.6, unit="of its time", doc="When the budget is that of the end.")
    learning_rate: float = field(
        number(0, above=True), 6e-3, doc="Of the probabilities (Adam); falls to 0 on a cosine."
    )
    final_temperature: float = field(number(0, 1, above=True), 0.03, doc="Of the soft masks, on a line from 1.")
    samples: int = field(integer(1), 2, doc="Masks for each batch, 1 or 2; their losses are averaged.")
    max_grad_norm: float = field(
        number(0, above=True), 3.0, doc="Of the gradient of the probabilities; longer ones are shortened."
    )
    seed: int = field(integer(0), 0, doc="Of the masks.")

    _learned: Learned | None = None
    _second = False
    _hooks: list[Any]

    def check(self) -> None:
        super().check()
        if self.prune_until <= self.prune_from:
            raise self.wrong("prune_until", f"must be after prune_from ({self.prune_from:g})")
        if self.samples > 2:
            raise self.wrong("samples", f"must be 1 or 2, not {self.samples}")

    # Forward passes

    def listen(self, training: Training) -> None:
        self._whole: dict[str, nn.Parameter] = {}

        def before(model: nn.Module, args: Any) -> None:
            event = training.clock.event(self.timing, self.phase, training.step)
            if (self.phase.started or event.starts) and not self.phase.ended:
                self._put_masks(training)

        def after(model: nn.Module, args: Any, output: Any) -> None:
            for name, parameter in self._whole.items():
                self.targets[name].module._parameters[name.rpartition(".")[2]] = parameter
            self._whole.clear()

        model = training.model
        self._hooks = [
            model.register_forward_pre_hook(before),
            model.register_forward_hook(after, always_call=True),
        ]

    def _put_masks(self, training: Training) -> None:
        if self._learned is None or not hasattr(self, "targets"):
            self._set_up(training)
        assert self._learned is not None
        hard = None if training.model.training else self._most_probable(training)
        random = generator(self.seed, training.step, int(self._second))
        temperature = 1 + (self.final_temperature - 1) * training.clock.progress(self.timing, training.step)
        for name, target in self.targets.items():
            mask = self._soft_mask(name, random, temperature) if hard is None else hard[name]
            self._whole[name] = target.parameter
            # A plain tensor in the parameter's place, which the layer computes with.
            parameters: dict[str, Any] = target.module._parameters
            parameters[name.rpartition(".")[2]] = target.parameter * mask.to(target.parameter.dtype)

    def _set_up(self, training: Training) -> None:
        self.attach(training)
        training.refuse_native(self.targets)
        if self._learned is None:
            ones = {name: torch.ones_like(target.parameter).detach() for name, target in self.targets.items()}
            self._learned = Learned(ones)

    def _soft_mask(self, name: str, random: torch.Generator, temperature: float) -> Tensor:
        assert self._learned is not None
        s = self._learned.values[name].requires_grad_()
        s = s.clamp(_EDGE, 1 - _EDGE)
        noise = torch.empty_like(s).uniform_(_EDGE, 1 - _EDGE, generator=random).logit_()
        return torch.sigmoid(((s.logit() + noise) / temperature).clamp(min=_LOWEST))

    # Steps

    def budget(self, training: Training) -> int:
        """How many weights are kept now."""
        assert self._learned is not None
        count = sum(value.numel() for value in self._learned.values.values())
        return round(self._kept_share(training.clock, training.step) * count)

    def _kept_share(self, clock: Clock, step: int) -> float:
        return kept_share(clock.progress(self.timing, step), self.final_sparsity, self.prune_from, self.prune_until)

    def loss(self, training: Training, loss: Tensor, forward: Forward) -> Tensor:
        if self.samples == 1:
            return loss
        self._second = True
        try:
            other = forward.need_again()
        finally:
            self._second = False
        return loss + (other - forward.loss) / 2

    @torch.no_grad()
    def before_step(self, training: Training) -> None:
        assert self._learned is not None
        gradients = {}
        for name, value in self._learned.values.items():
            if value.grad is not None:
                gradients[name] = training.mean(value.grad)
                value.grad = None
        rate = cosine(self.learning_rate, training.clock.progress(self.timing, training.step))
        self._learned.step(clip(gradients, self.max_grad_norm), rate)
        self._learned.project(self.budget(training))

    @torch.no_grad()
    def end(self, training: Training) -> None:
        masks = self._most_probable(training)
        training.masks.hold(self.owner, self.targets, training.agree(masks))
        self._learned = None

    @torch.no_grad()
    def _most_probable(self, training: Training) -> dict[str, Tensor]:
        assert self._learned is not None
        count = sum(value.numel() for value in self._learned.values.values())
        sparsity = 1 - self.budget(training) / count
        scores = {name: value.detach() for name, value in self._learned.values.items()}
        first = {name: torch.zeros_like(value, dtype=torch.bool) for name, value in scores.items()}
        return self.masks_by_score(scores, dict.fromkeys(scores, sparsity), scope="global", first=first)

    def stop_listening(self) -> None:
        for hook in getattr(self, "_hooks", []):
            hook.remove()
        self._hooks = []

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {} if self._learned is None else {"learned": self._learned.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._learned = Learned.of_state(state["learned"]) if "learned" in state else None

    def preview(self, clock: Clock, step: int) -> dict[str, float]:
        return {"sparsity": 1 - self._kept_share(clock, step)}

    def unfinished(self, training: Training) -> str:
        return f"the mask is due at epoch {self.end_epoch:g}, all weights are still there"
