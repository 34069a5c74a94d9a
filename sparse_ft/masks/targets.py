"""Which layers of a model are pruned, and which are left dense and why."""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from sparse_ft.nn import SparseModule, is_transformers_conv1d

from .names import match_names

AUTO = "auto"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Heads of transformers models that have no base model apart from the head, by the names transformers gives them.
_TRANSFORMERS_HEADS = frozenset({"classifier", "score", "lm_head", "qa_outputs", "pooler"})


class PrunableLayers(dict[str, nn.Module]):
    """Layers to prune by name, in module order; `skipped` has the others of a prunable type, and why they are left."""

    skipped: dict[str, str]

    def __init__(self, layers: dict[str, nn.Module], skipped: dict[str, str]) -> None:
        super().__init__(layers)
        self.skipped = skipped


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel and torch.compile, whose names have no prefix."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", None)  # torch.compile's wrapper
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def dense_shape(module: nn.Module) -> torch.Size:
    """Shape of a layer's weight in the state dict, which of a native sparse layer is not that of its parameter."""
    shape = module.dense_shape if isinstance(module, SparseModule) else module.weight.shape
    assert isinstance(shape, torch.Size)
    return shape


def _is_of(obj: object, library: str, name: str) -> bool:
    # An object of a class can only exist if its library has been imported: no need to import it to ask.
    cls = getattr(sys.modules.get(library), name, None)
    return cls is not None and isinstance(obj, cls)


def has_prunable_type(module: nn.Module) -> bool:
    """Whether this is a Linear, Conv1d, Conv2d, Conv3d, transformers Conv1D or SparseModule."""
    return isinstance(module, (nn.Linear, *_CONVOLUTIONS, SparseModule)) or is_transformers_conv1d(module)


def typed_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of a prunable type by name, in module order; a layer used in several places has its first name."""
    return {name: module for name, module in unwrap(model).named_modules() if has_prunable_type(module)}


def prunable_layers(model: nn.Module, ignore: str | Sequence[str] = AUTO) -> PrunableLayers:
    """Layers that pruning applies to: Linear, Conv1d, Conv2d, Conv3d, transformers' Conv1D and SparseModule.

    Layers whose weight is not an ordinary floating-point parameter (quantised, parametrised, not yet initialised)
    and second users of one parameter are always left out.

    Args:
        model: May be wrapped in DistributedDataParallel or torch.compile; the names are those of the model inside.
        ignore: `"auto"` leaves dense

            * the stem: the layer that timm calls `first_conv`, else the first convolution of the model;
            * the classifier head: for timm models what `get_classifier()` returns, for transformers models
              everything outside the base model, and `classifier`, `score`, `lm_head`, `qa_outputs` and `pooler`
              anywhere; for others the last Linear (the last convolution, if there is no Linear);
            * depthwise convolutions, whose filters have one input channel each;
            * weights tied to another module, such as an output layer that shares the embedding.

            A model of one prunable layer has neither stem nor head. Embeddings are never pruned. A list names the
            layers to leave dense instead: exact names or `"re:<pattern>"` (see `match_names`); `"auto"` in the list
            adds the rules above.

    Returns:
        A dict of the layers by name, in module order, whose `.skipped` maps the layers left out to the reason.

    Raises:
        ValueError: An entry of `ignore` matches no layer.
    """
    model = unwrap(model)
    layers = typed_layers(model)
    skipped = _unprunable(layers)
    if isinstance(ignore, str):
        if ignore != AUTO:
            raise ValueError(f'ignore must be "auto" or a list of layer names, not {ignore!r}')
        ignore = [AUTO]
    if AUTO in ignore:
        for name, reason in _left_dense(model, layers).items():
            skipped.setdefault(name, reason)
    for entry, names in match_names([entry for entry in ignore if entry != AUTO], list(layers)).items():
        for name in names:
            skipped.setdefault(name, f"ignored ({entry})")
    return PrunableLayers(
        {name: layer for name, layer in layers.items() if name not in skipped},
        {name: skipped[name] for name in layers if name in skipped},
    )


def _unprunable(layers: dict[str, nn.Module]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    first_user: dict[int, str] = {}
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        if weight is None:
            reasons[name] = "weight is not a parameter of its own"
        elif isinstance(weight, UninitializedParameter):
            reasons[name] = "weight is not initialised yet"
        elif not weight.is_floating_point():
            reasons[name] = f"weight is {weight.dtype}"
        elif (other := first_user.setdefault(id(weight), name)) != name:
            reasons[name] = f"tied to {other}"
    return reasons


def _left_dense(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    reasons = _tied(model, layers)
    for name, layer in layers.items():
        if getattr(layer, "groups", 1) == getattr(layer, "in_channels", None) != 1:
            reasons.setdefault(name, "depthwise")
    if len(layers) > 1:
        # Keep the role over the mechanism where a layer has several: "classifier head" tells more than "tied".
        reasons |= dict.fromkeys(_heads(model, layers), "classifier head")
        reasons |= dict.fromkeys(_stems(model, layers), "stem")
    return reasons


def _tied(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, str]:
    users: defaultdict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)].append(name)
    reasons = {}
    for name, layer in layers.items():
        others = [user for user in users[id(layer._parameters.get("weight"))] if user != name]
        if others:
            reasons[name] = f"tied to {others[0]}"
    return reasons


def _stems(model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    stems = []
    for prefix, part in _timm_parts(model):
        for first in _as_tuple(part.pretrained_cfg.get("first_conv")):
            if prefix + first in layers:
                stems.append(prefix + first)
    return stems or [name for name, layer in layers.items() if _is_convolution(layer)][:1]


def _heads(model: nn.Module, layers: dict[str, nn.Module]) -> set[str]:
    is_transformers = _is_of(model, "transformers.modeling_utils", "PreTrainedModel")
    timm_parts = list(_timm_parts(model))
    heads: set[str] = set()
    for _, part in timm_parts:
        inside = {id(module) for head in _as_tuple(part.get_classifier()) for module in head.modules()}
        heads |= {name for name, layer in layers.items() if id(layer) in inside}
    if is_transformers:
        base_model = model.base_model
        assert isinstance(base_model, nn.Module)
        base = {id(module) for module in base_model.modules()}
        for name, layer in layers.items():
            if id(layer) not in base or _TRANSFORMERS_HEADS.intersection(name.split(".")):
                heads.add(name)
    if not is_transformers and not timm_parts:
        linear = [name for name, layer in layers.items() if not _is_convolution(layer)]
        heads.add((linear or list(layers))[-1])
    return heads


def _timm_parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Models of timm, the model itself or inside it (transformers wraps them), with the prefix of their names."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "pretrained_cfg", None), dict) and hasattr(module, "get_classifier"):
            yield f"{name}." if name else "", module


def _is_convolution(layer: nn.Module) -> bool:
    if isinstance(layer, SparseModule):
        return len(dense_shape(layer)) > 2
    return isinstance(layer, _CONVOLUTIONS)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, tuple | list) else (value,)
