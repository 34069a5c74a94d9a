"""SWAT: dense weights that train through their largest ones, and through the largest of their inputs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.masks import prunable_layers
from sparse_ft.nn import SparseConv2d, follow_layout, restore_stock
from sparse_ft.ops.thresholds import count_at_least
from sparse_ft.optimizer_state import elementwise_state
from sparse_ft.tune import TimingCache

from ..base import Bounded
from ..clock import Clock
from ..fields import EPOCH, FLAG, NOTHING, choice, either, field, integer
from ..pruning import SPARSITY, MaskedTargets
from ..registry import register
from ..targets import ALL_PRUNABLE, Target
from ..training import Training
from . import budgets
from .active import Active, Geometry
from .layers import State, adapt, obstacle, restore
from .products import Products

_MOMENTA = ("momentum_buffer", "exp_avg")  # of SGD and of Adam


@register("SWATModifier")
class SWAT(MaskedTargets, Bounded):
    """Sparse compute from the second step on, with dense weights behind it.

    Forward pass and input gradient use the largest weights of each layer, the weight gradient the largest values of
    its input over the whole batch; it is dense, so that every weight may come to be used. The magnitudes from which on
    weights are used and values kept are found anew every `update_period` steps. At the end the weights are pruned for
    good.
    """

    source = "Raihan & Aamodt 2020, arXiv 2001.01969"
    completes = True
    dense_until_end = True

    sparsity: float = field(SPARSITY, unit="fraction of zeros", doc="Of the weights in use, and at the end.")
    activation_sparsity: float | None = field(
        either(SPARSITY, NOTHING), None, unit="fraction of zeros",
        doc="Of the inputs that are kept for the weight gradient; nothing for each layer's own weight sparsity.",
    )  # fmt: skip
    update_period: int = field(
        integer(1),
        10,
        unit="steps",
        doc="Between two choices of weights and thresholds; a fifth of an epoch for ImageNet.",
    )
    between: str = field(
        choice("threshold", "weights"), "threshold",
        doc="What stands until the next choice: the threshold, above which weights come and go at every step; or the"
        " chosen weights, which saves making patterns and trains worse.",
    )  # fmt: skip
    scope: str = field(
        choice("uniform", "erk", "momentum"), "uniform",
        doc="Every weight alike (with __ALL_PRUNABLE__ the first convolution stays dense), more in larger layers, or"
        " more where momentum is larger: SWAT-U, -ERK and -M.",
    )  # fmt: skip
    mask_type: str = field(
        choice("unstructured", "channel", "filter"), "unstructured",
        doc="What is chosen together in convolutions: single weights, kernels of two channels, filters.",
    )  # fmt: skip
    policy: str = field(
        choice("auto", "always", "none"), "auto",
        doc="Which products run on the sparse kernels: those that are faster so, all, none.",
    )  # fmt: skip
    end_epoch: float = field(
        EPOCH, unit="epochs", doc="When the weights are pruned for good: the end of the training."
    )
    leave_enabled: bool = field(FLAG, True, doc="Keep the mask after the end.")

    def __init__(self, **values: Any):
        super().__init__(**values)
        self._states: dict[str, State] = {}
        self._saved: Mapping[str, Any] = {}
        self._model: nn.Module | None = None
        self._began = 0  # step

    def find_targets(self, model: nn.Module) -> dict[str, Target]:
        targets = super().find_targets(model)
        if self.params == ALL_PRUNABLE:
            targets = {name: target for name, target in targets.items() if not obstacle(target.module)}
            if self.scope == "uniform":
                stems = [
                    f"{name}.weight" for name, reason in prunable_layers(model).skipped.items() if reason == "stem"
                ]
                targets = {name: target for name, target in targets.items() if name not in stems} or targets
        for name, target in targets.items():
            if name != "weight" and not name.endswith(".weight"):
                raise self.wrong("params", f"{name} is not the weight of a layer")
            if reason := obstacle(target.module):
                raise self.wrong("params", f"{name} cannot train with SWAT ({reason}): leave it out by `ignore`")
        if not targets:
            raise self.wrong("params", "the model has no Linear or Conv2d weights")
        return targets

    # At work

    def start(self, training: Training) -> None:
        self.attach(training)
        training.refuse_native(self.targets)
        if self.scope == "momentum" and not all(
            group.get("momentum") or "betas" in group for group in training.optimizer.param_groups
        ):
            raise self.wrong("scope", "momentum needs an optimizer with momentum: SGD with momentum, Adam or AdamW")
        self._began = training.step
        keep = self._budget(training)
        self._adapt(training, self._choose(training, keep), keep)

    def resume(self, training: Training) -> None:
        super().resume(training)
        if self.phase.ended:
            return
        self._adapt(training, {
            name: self._active(name, mask=mask, threshold=self._saved["weight_thresholds"][name])
            for name, mask in self._saved["masks"].items()
        }, self._budget(training))  # fmt: skip
        for name, state in self._states.items():
            state.threshold = self._saved["thresholds"][name]
            state.keep = self._saved["kept_inputs"][name]
            state.products.forms = dict(self._saved["forms"][name])

    def _adapt(self, training: Training, chosen: Mapping[str, Active], keep: Mapping[str, int]) -> None:
        self.stop_listening()
        self._model = training.model
        cache = TimingCache() if self.policy == "auto" else None
        period = self.update_period if self.between == "weights" else 1
        for name, active in chosen.items():
            products = Products(active.geometry, self.policy, period, cache)
            self._states[name] = State(products, active, self._kept_share(name, keep[name]))
            adapt(self.targets[name].module, self._states[name])
        if any(isinstance(self.targets[name].module, nn.Conv2d) for name in self._states) and self.policy != "none":
            for module in training.model.modules():
                follow_layout(module)

    def _kept_share(self, name: str, keep: int) -> float:
        """Of the input."""
        if self.activation_sparsity is not None:
            return 1.0 - self.activation_sparsity
        return keep / self.targets[name].parameter.numel()

    def _choose(self, training: Training, keep: Mapping[str, int]) -> dict[str, Active]:
        """The weights to use from now on, of all layers but those whose budget leaves them dense."""
        weights = {
            name: target.parameter.detach()
            for name, target in self.targets.items()
            if keep[name] < target.parameter.numel()
        }
        if self.between == "weights":
            masks = self._masks(training, weights, keep)
            return {name: self._active(name, mask=mask) for name, mask in masks.items()}
        found = [budgets.smallest_kept(weight, keep[name], self.mask_type) for name, weight in weights.items()]
        thresholds = training.share(torch.tensor(found, dtype=torch.float64)).tolist()
        chosen = {}
        for (name, weight), threshold in zip(weights.items(), thresholds, strict=True):
            alike = self.mask_type != "unstructured" or count_at_least(weight, threshold) > keep[name]
            mask = budgets.active_mask(weight, keep[name], self.mask_type) if alike else None
            chosen[name] = self._active(name, mask=mask, threshold=threshold)
        return chosen

    def _active(self, name: str, **which: Any) -> Active:
        module: Any = self.targets[name].module
        structure = self.mask_type if isinstance(module, nn.Conv2d) else "unstructured"
        return Active(Geometry.of(module), module.weight, structure=structure, **which)

    def _masks(self, training: Training, weights: Mapping[str, Tensor], keep: Mapping[str, int]) -> dict[str, Tensor]:
        """The largest of each weight, for good or until the next choice."""
        return training.agree(
            {name: budgets.active_mask(weight, keep[name], self.mask_type) for name, weight in weights.items()}
        )

    def _budget(self, training: Training) -> dict[str, int]:
        shapes = {name: target.parameter.shape for name, target in self.targets.items()}
        if self.scope == "erk":
            return budgets.erk(shapes, self.sparsity)
        kept = budgets.uniform(shapes, self.sparsity)
        if self.scope == "uniform" or not self._states:
            return kept
        means = {name: self._mean_momentum(training, name) for name in self.targets}
        return budgets.momentum(means, {name: shape.numel() for name, shape in shapes.items()}, sum(kept.values()))

    def _mean_momentum(self, training: Training, name: str) -> float:
        """Mean magnitude of the momentum of the weights in use."""
        found = dict(elementwise_state(training.optimizer, self.targets[name].parameter))
        momentum = next((found[key] for key in _MOMENTA if key in found), None)
        if momentum is None:  # it has had no gradient yet
            return 0.0
        mask = self._states[name].active.mask(self.targets[name].parameter)
        return float(momentum[mask].abs().mean()) if mask.any() else 0.0

    def before_step(self, training: Training) -> None:
        """Thresholds that were found in this step are those of the first process, for all."""
        if self._is_due(training.step - 1) or training.step == self._began + 1:
            thresholds = [state.threshold for state in self._states.values()]
            found = torch.tensor([torch.nan if t is None else t for t in thresholds], dtype=torch.float64)
            shared = training.share(found)
            for state, threshold in zip(self._states.values(), shared.tolist(), strict=True):
                state.threshold = None if threshold != threshold else threshold

    def after_step(self, training: Training) -> None:
        for state in self._states.values():
            state.active.changed()
        if not self._states or not self._is_due(training.step):
            return
        keep = self._budget(training)
        chosen = self._choose(training, keep)
        for name, state in self._states.items():
            state.active = chosen[name]
            state.keep, state.threshold = self._kept_share(name, keep[name]), None

    def _is_due(self, step: int) -> bool:
        """Whether weights and thresholds are chosen anew after a step."""
        return step > self._began and (step - self._began) % self.update_period == 0

    def end(self, training: Training) -> None:
        weights = {name: target.parameter.detach() for name, target in self.targets.items()}
        masks = self._masks(training, weights, self._budget(training))
        self.stop_listening()
        training.masks.hold(self.owner, self.targets, masks)
        if not self.leave_enabled:
            training.masks.release(self.owner, at_once=training.sparseml)

    def stop_listening(self) -> None:
        """The layers compute as ever again, with all their weights."""
        for name in self._states:
            restore(self.targets[name].module)
        self._states = {}
        if self._model is not None and not any(isinstance(m, SparseConv2d) for m in self._model.modules()):
            for module in self._model.modules():
                restore_stock(module)
        self._model = None

    def state_dict(self) -> dict[str, Any]:
        if not self._states:
            return {}
        return {
            "began": self._began,
            "masks": {name: state.active.mask(self.targets[name].parameter) for name, state in self._states.items()},
            "thresholds": {name: state.threshold for name, state in self._states.items()},
            "weight_thresholds": {name: state.active.threshold for name, state in self._states.items()},
            "kept_inputs": {name: state.keep for name, state in self._states.items()},
            "forms": {name: dict(state.products.forms) for name, state in self._states.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._saved = state
        self._began = int(state.get("began", 0))

    def preview(self, clock: Clock, step: int) -> dict[str, float]:
        return {"sparsity": self.sparsity}

    def unfinished(self, training: Training) -> str:
        return f"the weights are to be pruned to a sparsity of {self.sparsity:g} at epoch {self.end_epoch:g}"
