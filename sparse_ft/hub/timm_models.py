"""timm models: built from a checkpoint folder, wrapped for the Trainer, described in a config.json that both
timm and transformers read."""

import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, filter_pretrained_cfg
from timm.models._hub import load_model_config_from_path, save_config_for_hf
from torch import Tensor, nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from .errors import ModelError, one_line
from .filling import Filling, Handed
from .foreign import fit
from .limits import Budget

# Arguments that say where weights come from and how they are taken, which a stranger's config.json may not.
_FACTORY_ARGUMENTS = {
    name for factory in (timm.create_model, build_model_with_cfg) for name in inspect.signature(factory).parameters
}


def is_timm_model(model: nn.Module) -> bool:
    return isinstance(getattr(model, "pretrained_cfg", None), dict) and hasattr(model, "num_classes")


def create(architecture: str, num_classes: int | None, model_args: Mapping[str, Any]) -> nn.Module:
    """A timm model with random weights."""
    return timm.create_model(architecture, num_classes=num_classes, **model_args)


def load(
    folder: Path, state_dict: Mapping[str, Tensor], num_classes: int | None, *, hand_over: bool = False
) -> nn.Module:
    """The timm model that the config.json of `folder` describes, with the weights of `state_dict`.

    Args:
        folder: Holds config.json.
        state_dict: All weights.
        num_classes: Another number than the checkpoint's replaces the classifier by a new one.
        hand_over: Nobody else uses the tensors, nor the memory behind them, so that they may become the model's own.

    Raises:
        ModelError: config.json names an architecture unknown to this timm, or the weights do not fit it.
    """
    try:
        pretrained_cfg, architecture, model_args = load_model_config_from_path(folder)
        model_args = {name: value for name, value in model_args.items() if name != "num_classes"}
    except (AttributeError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}/config.json does not describe a timm model: {one_line(error)}") from error
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise ModelError(f"{folder}/config.json: timm {timm.__version__} has no architecture {architecture!r:.80}")
    if control := sorted(_FACTORY_ARGUMENTS.intersection(model_args)):
        raise ModelError(f"{folder}/config.json: model_args may not hold {control[0]!r}")
    budget = Budget.of_tensors(tensor.numel() for tensor in state_dict.values())
    try:
        with budget.enforced():
            empty = _empty(architecture, pretrained_cfg, model_args)
            hand_over = hand_over and not _shares_parameters(empty)
            model = _filled(architecture, pretrained_cfg, model_args, state_dict, hand_over=hand_over)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from error
    except Exception as error:  # whatever a stranger's settings make an architecture raise
        problem = _difference(architecture, pretrained_cfg, model_args, state_dict) or one_line(error)
        raise ModelError(f"{folder}: {problem}") from error
    for name in ("state_dict", "source", "file"):  # of this load, not of the model
        model.pretrained_cfg.pop(name, None)
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    return model


def create_with(
    architecture: str,
    state_dict: Mapping[str, Tensor],
    num_classes: int | None,
    model_args: Mapping[str, Any],
    where: str,
) -> nn.Module:
    """A timm model with the weights of a checkpoint, which also tells how many classes it was trained for.

    Another `num_classes` replaces the classifier by a new one.

    Raises:
        ModelError: The weights are of another architecture; `where` is named as their place.
    """
    model: Any = timm.create_model(architecture, **model_args)
    classifier = state_dict.get(f"{model.pretrained_cfg.get('classifier')}.weight")
    if classifier is not None and classifier.dim() > 0 and len(classifier) != model.num_classes:
        model.reset_classifier(len(classifier))
    model.load_state_dict(fit(state_dict, model.state_dict(), where), strict=False)  # `fit` is stricter
    if num_classes is not None and num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    return model


def _filled(
    architecture: str,
    pretrained_cfg: Mapping[str, Any],
    model_args: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    *,
    hand_over: bool,
) -> Any:
    def create() -> Any:
        # The weights travel in the config, so that timm applies the checkpoint filters of the architecture to them.
        weights = (Handed if hand_over else dict)(state_dict)
        return timm.create_model(
            architecture,
            pretrained=True,
            pretrained_cfg={**pretrained_cfg, "source": "", "state_dict": weights},
            pretrained_model_args=dict(model_args),
            **model_args,
        )

    with Filling(state_dict) as filling:
        model = create()
    # Of some architectures, timm takes a checkpoint that lacks weights; those are to be random ones.
    return create() if filling.unfilled(model) else model


def _shares_parameters(model: nn.Module) -> bool:
    return len(list(model.parameters())) < len(list(model.named_parameters(remove_duplicate=False)))


def _empty(architecture: str, pretrained_cfg: dict[str, Any], model_args: Mapping[str, Any]) -> nn.Module:
    """The model that config.json describes, without memory for its numbers."""
    with torch.device("meta"), Filling({}):
        return timm.create_model(architecture, pretrained_cfg=deepcopy(pretrained_cfg), **model_args)


def _difference(
    architecture: str, pretrained_cfg: dict[str, Any], model_args: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> str | None:
    """How the weights differ from the model that config.json describes, if it describes one."""
    try:
        empty = _empty(architecture, pretrained_cfg, model_args)
    except Exception:  # then the settings are the problem, and the caller has their error
        return None
    expected = empty.state_dict()
    for name, tensor in state_dict.items():
        if name in expected and tensor.shape != expected[name].shape:
            return (
                f"{name} has shape {tuple(tensor.shape)} in the weights file, "
                f"but config.json asks for {tuple(expected[name].shape)}"
            )
    for problem, names in (
        ("the weights file lacks", [name for name in expected if name not in state_dict]),
        ("config.json has no place for", [name for name in state_dict if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{problem} {names[0]}{more}"
    return None


def set_labels(model: Any, label_names: Sequence[str]) -> None:
    """Record the names of the classes in the model, where `config_dict` and the card find them."""
    model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": model.num_classes, "label_names": list(label_names)}


def config_dict(model: Any, pretrained_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a timm model with this preprocessing and these ``label_names`` in `pretrained_cfg`.

    ``num_classes`` is left out of ``model_args``, where timm 1.0.31 records it too: transformers passes it by itself,
    and its TimmWrapper would fail on the second value.
    """
    changes = filter_pretrained_cfg(dict(pretrained_cfg), remove_source=True, remove_null=True)
    names = changes.pop("label_names", None)
    if names is not None and len(names) != model.num_classes:
        names = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        try:
            save_config_for_hf(model, str(path), model_config={"pretrained_cfg": changes, "label_names": names})
        except ValueError as error:  # an argument of create_model that is not JSON
            raise ModelError(f"config.json cannot describe this {type(model).__name__}: {error}") from error
        config = json.loads(path.read_text())
    config.get("model_args", {}).pop("num_classes", None)
    config["pretrained_cfg"].pop("label_names", None)
    return config


def wrap(model: Any) -> TimmWrapperForImageClassification:
    """The model as transformers' Trainer takes it: ``pixel_values`` and ``labels`` in, loss and logits out.

    Raises:
        ModelError: The model has no classifier.
    """
    if not model.num_classes:
        raise ModelError(f"this {type(model).__name__} has no classifier: give num_labels")
    config = TimmWrapperConfig.from_dict(config_dict(model, model.pretrained_cfg))
    wrapper = TimmWrapperForImageClassification(config)
    wrapper.timm_model = model
    return wrapper


def wrapper_pretrained_cfg(wrapper: TimmWrapperForImageClassification) -> dict[str, Any]:
    """``pretrained_cfg`` of the timm model in a wrapper, with the preprocessing and labels of the wrapper's config.

    transformers builds the inner model without them.
    """
    model: Any = wrapper.timm_model
    config: Any = wrapper.config
    names = [config.id2label[index] for index in range(config.num_labels)]
    if names == [f"LABEL_{index}" for index in range(len(names))]:
        names = model.pretrained_cfg.get("label_names")
    return {**model.pretrained_cfg, **getattr(config, "pretrained_cfg", {}), "label_names": names}
