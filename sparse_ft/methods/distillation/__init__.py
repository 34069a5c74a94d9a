"""Distillation: learning from a teacher's outputs, or from those of its layers."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_ft.masks.targets import prunable_layers

from ..base import Forward, Modifier
from ..fields import EPOCH, FLAG, NEVER, NOTHING, TEXTS, either, field, number
from ..registry import register
from ..training import Training
from .projections import Projections

_OPTIONAL_TEXTS = either(TEXTS, NOTHING)
LOGITS = "logits"


class _Distilling(Modifier):
    changes_loss = True
    needs_teacher = True

    start_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="When it begins; -1 for at once.")
    end_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="When it ends; -1 for never.")
    teacher_input_keys: Any = field(
        _OPTIONAL_TEXTS, None, doc="Inputs that the teacher gets; all but labels if it is not given."
    )

    def ask_teacher(self, teacher: nn.Module, forward: Forward) -> Any:
        """The teacher's outputs, without gradients."""
        inputs = forward.inputs
        keys: list[str] = []
        if isinstance(inputs, Mapping):
            keys = self.teacher_input_keys or [key for key in inputs if key not in ("labels", "label")]
            if missing := [key for key in keys if key not in inputs]:
                raise self.wrong("teacher_input_keys", f"the inputs are {', '.join(inputs)}; no {missing[0]!r}")
        asked = tuple(keys)
        if asked not in forward.taught:
            with torch.no_grad():
                if isinstance(inputs, Mapping):
                    answer = teacher(**{key: inputs[key] for key in keys})
                else:
                    answer = teacher(*inputs) if isinstance(inputs, list | tuple) else teacher(inputs)
            forward.taught[asked] = answer
        return forward.taught[asked]


@register("DistillationModifier")
class Distillation(_Distilling):
    """Learns from a teacher's outputs beside the labels: hardness x T^2 x KL divergence + (1 - hardness) x loss.

    The divergence is that of the softened probabilities (logits / temperature), averaged over all predictions.
    """

    source = "Hinton et al. 2015, arXiv 1503.02531"
    hardness: float = field(number(0, 1), 0.5, doc="Weight of the teacher against the labels.")
    temperature: float = field(number(0, above=True), 2.0, doc="How soft the probabilities are.")
    distill_output_keys: Any = field(
        _OPTIONAL_TEXTS,
        None,
        doc="Outputs to learn from, such as [start_logits, end_logits]; logits if it is not given.",
    )

    def loss(self, training: Training, loss: Tensor, forward: Forward) -> Tensor:
        teacher = self.ask_teacher(training.need_teacher(), forward)
        pairs = zip(self._logits(forward.outputs, "model"), self._logits(teacher, "teacher"), strict=True)
        terms = [self._divergence(ours, theirs) for ours, theirs in pairs]
        return self.hardness * forward.scale * sum(terms) / len(terms) + (1 - self.hardness) * loss

    def _divergence(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if ours.shape != theirs.shape:
            raise ValueError(
                f"the model gives outputs of shape {tuple(ours.shape)}, the teacher {tuple(theirs.shape)}"
            )
        log_p = F.log_softmax(ours / self.temperature, -1).flatten(0, -2)
        q = F.softmax(theirs / self.temperature, -1).flatten(0, -2)
        return F.kl_div(log_p, q, reduction="batchmean") * self.temperature**2

    def _logits(self, outputs: Any, whose: str) -> list[Tensor]:
        if isinstance(outputs, Tensor):
            return [outputs]
        if not isinstance(outputs, Mapping):
            return [next(each for each in outputs if isinstance(each, Tensor) and each.ndim > 1)]
        keys = self.distill_output_keys or [LOGITS]
        missing = [key for key in keys if key not in outputs]
        if missing:
            raise self.wrong(
                "distill_output_keys", f"the outputs of the {whose} are {', '.join(outputs)}; no {missing[0]!r}"
            )
        return [outputs[key] for key in keys]


@register("PerLayerDistillationModifier")
class PerLayerDistillation(_Distilling):
    """Learns from the outputs of a teacher's layers: loss + gain x the mean of their squared differences.

    The difference of a layer is relative to the mean square of the teacher's output with `normalize`. Where the layers
    have different numbers of features, a linear map from the model's to the teacher's is trained beside the model, by
    Adam with the learning rate of the training.
    """

    source = "Kurtic et al. 2023, arXiv 2310.06927"
    gain: float = field(number(0), 1.5, doc="Weight of the layers against the loss.")
    normalize: bool = field(FLAG, True, doc="Take differences relative to the size of the teacher's output.")
    student_layer_names: Any = field(
        _OPTIONAL_TEXTS, None, doc="Layers of the model; its linear and convolution layers if it is not given."
    )
    teacher_layer_names: Any = field(
        _OPTIONAL_TEXTS, None, doc="The teacher's, in the same order; the same names if not given."
    )
    project_features: bool = field(FLAG, True, doc="Map features to the teacher's where their numbers differ.")
    epsilon: float = field(number(0, above=True), 1e-6, doc="Added to the size of the teacher's output.")

    def check(self) -> None:
        ours, theirs = self.student_layer_names, self.teacher_layer_names
        if theirs is not None and (ours is None or len(ours) != len(theirs)):
            raise self.wrong("teacher_layer_names", "must be as many as student_layer_names")

    def listen(self, training: Training) -> None:
        self._projections = Projections()
        names = self.student_layer_names or list(prunable_layers(training.model, []))
        theirs = self.teacher_layer_names or names
        self._heard: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._hooks = []
        for model, chosen, heard, field_name in (
            (training.model, names, self._heard[0], "student_layer_names"),
            (training.need_teacher(), theirs, self._heard[1], "teacher_layer_names"),
        ):
            for place, name in enumerate(chosen):
                try:
                    layer = model.get_submodule(name)
                except AttributeError:
                    raise self.wrong(field_name, f"there is no layer {name!r}") from None
                self._hooks.append(layer.register_forward_hook(_hear(heard, str(place), model is training.model)))

    def stop_listening(self) -> None:
        for hook in getattr(self, "_hooks", []):
            hook.remove()
        self._hooks = []

    def loss(self, training: Training, loss: Tensor, forward: Forward) -> Tensor:
        self.ask_teacher(training.need_teacher(), forward)
        ours, theirs = self._heard
        terms = []
        for place, output in ours.items():
            target = theirs[place]
            if output.shape != target.shape:
                output = self._projected(training, place, output, target)
            difference = F.mse_loss(output, target)
            terms.append(difference / (target.square().mean() + self.epsilon) if self.normalize else difference)
        ours.clear()
        theirs.clear()
        return loss + self.gain * forward.scale * sum(terms) / max(1, len(terms))

    def _projected(self, training: Training, place: str, output: Tensor, target: Tensor) -> Tensor:
        """The output with as many features as the teacher's."""
        axis = 1 if output.ndim == 4 else -1
        ours, theirs = (list(features.shape) for features in (output, target))
        counts = ours.pop(axis), theirs.pop(axis)
        if not self.project_features or ours != theirs:
            raise ValueError(
                f"layers have outputs of shape {tuple(output.shape)} and, of the teacher, {tuple(target.shape)}"
            )
        if place not in self._projections.maps:
            self._projections.add(place, *counts, like=output)
        return F.linear(output.movedim(axis, -1), self._projections.maps[place]).movedim(-1, axis)

    def before_step(self, training: Training) -> None:
        self._projections.step(training.optimizer.param_groups[0]["lr"])

    def end(self, training: Training) -> None:
        self.stop_listening()

    def state_dict(self) -> dict[str, Any]:
        return {"projections": self._projections.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._projections.load_state_dict(state["projections"])


def _hear(heard: dict[str, Tensor], place: str, in_training: bool):
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training == in_training:  # not when the model is evaluated
            heard[place] = output

    return hook
