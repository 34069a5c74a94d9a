"""Dense modules to native sparse modules and back, in place."""

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from sparse_ft.masks.names import match_names, weight_name
from sparse_ft.masks.targets import typed_layers, unwrap
from sparse_ft.nn import (
    SparseConv2d,
    SparseLinear,
    SparseModule,
    follow_layout,
    is_transformers_conv1d,
    restore_stock,
    stock_type,
)
from sparse_ft.ops.pattern import count_nonzero
from sparse_ft.randomness import preserved_random_state
from sparse_ft.steps import call
from sparse_ft.tables import format_table
from sparse_ft.tune import IMAGE_CHANNELS, Timing, TimingCache, layer_key, step_key, time_layer, time_step

logger = logging.getLogger(__name__)

# Modules that read their children's weights instead of calling them.
_READS_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_WORTH = 0.97  # a whole model is converted if its step takes at most this share of the dense one's


@dataclass(frozen=True)
class LayerConversion:
    """One layer of a conversion: what became of it, why, and what was measured (forward + backward, ms; forward
    alone where the model is not trained)."""

    name: str
    kind: str
    shape: tuple[int, ...]
    nnz: int
    sparsity: float
    converted: bool
    reason: str
    dense_ms: float | None = None
    sparse_ms: float | None = None


@dataclass
class ConversionReport:
    """What `convert` did, layer by layer; `str()` is a table.

    With `policy="auto"`, `step` is forward and backward of the whole model (forward alone if it is not trained), dense
    against sparse, and `note` says what was concluded from it.
    """

    policy: str
    layers: list[LayerConversion] = field(default_factory=list)
    step: Timing | None = None
    note: str = ""

    @property
    def converted(self) -> list[str]:
        """Names of the layers that now run on the native kernels."""
        return [layer.name for layer in self.layers if layer.converted]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "policy": self.policy,
            "layers": [asdict(layer) for layer in self.layers],
            "step": self.step and asdict(self.step),
            "note": self.note,
        }

    def __str__(self) -> str:
        def ms(value: float | None) -> str:
            return "" if value is None else f"{value:.2f}"

        rows = [
            [
                layer.name, layer.kind, "x".join(map(str, layer.shape)), f"{layer.sparsity:.1%}",
                "sparse" if layer.converted else "dense", ms(layer.dense_ms), ms(layer.sparse_ms), layer.reason,
            ]
            for layer in self.layers
        ]  # fmt: skip
        headers = ["layer", "kind", "weight", "sparsity", "runs", "dense ms", "sparse ms", "why"]
        return (
            f"{len(self.converted)} of {len(self.layers)} layers run sparse (policy {self.policy})\n"
            + (f"{self.note}\n" if self.note else "")
            + format_table(headers, rows)
        )


def convert(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    policy: str = "auto",
    min_sparsity: float = 0.5,
    ignore: Iterable[str] = (),
    masks: Mapping[str, Tensor] | None = None,
    layers: Iterable[str] | None = None,
) -> ConversionReport:
    """Turn pruned layers of `model` into native sparse layers, in place.

    Linear (also transformers' Conv1D) and Conv2d layers whose weight has enough zeros become `SparseLinear` and
    `SparseConv2d`; stock norms and convolutions take the layout that sparse convolutions give, and `nn.Dropout` draws
    natively: with the same distribution, but other random numbers. Names, state dict and results stay those of the
    dense model; `to_dense` is the exact inverse. Parameters of converted layers are new
    objects, so convert before making an optimizer.

    Args:
        example_inputs: a batch such as training will see (tensor, tuple, or dict of keyword arguments), for
            `policy="auto"`; None makes one from what a timm or transformers model says of its input.
        policy: "auto" keeps of each layer the form that is faster, forward and backward, on the real input shape,
            and then makes sure that the whole model is faster than the dense one, else it is left dense; what was
            measured is kept per machine. A network's first convolution, and depthwise ones, may run natively without
            zeros. Where nothing in the model is trained (`requires_grad`), forward alone counts; under autocast to
            bfloat16 both forms are timed in that. "always" converts every layer with enough zeros.
        min_sparsity: layers with a smaller fraction of zeros stay dense.
        ignore: names or `"re:pattern"` of layers to leave dense.
        masks: weight name -> bool mask of the positions to train, where it differs from the nonzeros (active zeros).
        layers: convert exactly these layers (names), without measuring: a choice made earlier.

    Raises:
        ValueError: for an unknown policy, a `min_sparsity` outside [0, 1], an `ignore` entry that matches nothing,
            a mask that leaves out nonzero weights, `layers` that cannot be converted, or "auto" without example
            inputs for a model that does not say what it takes.
    """
    if policy not in ("auto", "always"):
        raise ValueError(f'policy must be "auto" or "always", not {policy!r}')
    if not 0.0 <= min_sparsity <= 1.0:
        raise ValueError(f"min_sparsity must be in [0, 1], not {min_sparsity}")
    if isinstance(ignore, str):
        raise ValueError(f"ignore must be a list of layer names, not the text {ignore!r}")
    model = unwrap(model)
    trained = any(parameter.requires_grad for parameter in model.parameters())
    candidates = _Candidates(model, min_sparsity, ignore, masks or {})
    report = ConversionReport(policy)
    if layers is not None:
        chosen = set(layers)
        unknown = chosen - set(candidates.entries)
        if unknown:
            raise ValueError(f"the model has no such layers to convert: {', '.join(sorted(unknown))}")
        for name, entry in candidates.entries.items():
            if name in chosen and entry.obstacle:
                raise ValueError(f"layer {name!r} cannot be converted: {entry.obstacle}")
            entry.converted = name in chosen
            entry.reason = entry.obstacle or ("chosen earlier" if entry.converted else "not chosen earlier")
    elif candidates.eligible:
        with preserved_random_state():
            shapes = None
            if policy == "auto" or example_inputs is not None:
                example_inputs = _example_inputs(model) if example_inputs is None else example_inputs
                shapes = _input_shapes(model, candidates.eligible, example_inputs)
            if policy == "always":
                _choose_all(candidates, shapes)
            else:
                assert shapes is not None
                cache = TimingCache()
                use = _Use(
                    trained=trained,
                    dtype=torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32,
                )
                _choose_faster(candidates, shapes, cache, use)
                report.step, report.note = _check_whole(model, candidates, example_inputs, cache, use)
                cache.save()
    report.layers = [entry.result() for entry in candidates.entries.values()]
    _install(model, candidates.taken_out())
    logger.info("%d of %d layers run sparse", len(report.converted), len(report.layers))
    return report


def _install(model: nn.Module, layers: Iterable[tuple[str, SparseModule]]) -> None:
    """Puts sparse layers into the places of the dense ones, and adapts their neighbours."""
    places = _places(model)
    for name, sparse in layers:
        dense = model.get_submodule(name)
        _move_hooks(dense, sparse)
        _replace(places, dense, sparse)
    sparse_layers = [module for module in model.modules() if isinstance(module, SparseModule)]
    if sparse_layers:
        convolutions = any(isinstance(module, SparseConv2d) for module in sparse_layers)
        for module in model.modules():
            follow_layout(module, convolutions=convolutions)


def to_dense(model: nn.Module) -> nn.Module:
    """Turn every sparse layer back into the dense layer that it was, in place; returns `model`.

    Zeros are kept. A model that is itself one sparse layer is returned as a new dense layer.
    """
    inner = unwrap(model)
    if isinstance(inner, SparseModule):
        return inner.to_dense()
    places = _places(inner)
    for module in list(inner.modules()):
        if isinstance(module, SparseModule):
            dense = module.to_dense()
            _move_hooks(module, dense)
            _replace(places, module, dense)
        else:
            restore_stock(module)
    return model


@dataclass
class _Entry:
    name: str
    module: nn.Module
    mask: Tensor | None
    obstacle: str = ""  # why it has no sparse form
    reason: str = ""  # why it is what it becomes
    joins: bool = False  # a layer without zeros, which runs sparse to keep the layout of its neighbours
    converted: bool = False
    dense_ms: float | None = None
    sparse_ms: float | None = None
    _sparse: SparseModule | None = None

    def __post_init__(self) -> None:
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        self.weight = weight
        self.shape = () if isinstance(weight, UninitializedParameter) else tuple(weight.shape)
        if self.mask is not None and self.mask.shape != self.shape:
            raise ValueError(f"mask of {self.name}.weight has shape {tuple(self.mask.shape)}, the weight {self.shape}")
        kept = weight if self.mask is None else self.mask
        self.nnz = 0 if isinstance(kept, UninitializedParameter) else count_nonzero(kept)

    @property
    def sparsity(self) -> float:
        return 1.0 - self.nnz / max(1, math.prod(self.shape))

    def sparse(self) -> SparseModule:
        if self._sparse is None:
            kind = SparseConv2d if isinstance(self.module, nn.Conv2d) else SparseLinear
            mask = torch.ones_like(self.weight, dtype=torch.bool) if self.joins else self.mask
            self._sparse = kind.from_dense(self.module, mask)  # type: ignore[arg-type]
            lost = 0
            if mask is not None:
                lost = int(torch.count_nonzero(self.weight)) - int(torch.count_nonzero(self._sparse.weight))
            if lost:
                raise ValueError(f"the mask of {self.name}.weight leaves out {lost} nonzero weights; prune them first")
        return self._sparse

    def result(self) -> LayerConversion:
        return LayerConversion(
            self.name, stock_type(self.module).__name__, self.shape, self.nnz, self.sparsity, self.converted,
            self.reason, self.dense_ms, self.sparse_ms,
        )  # fmt: skip


class _Candidates:
    """The layers that conversion looks at, with the reason why one cannot be converted."""

    def __init__(self, model: nn.Module, min_sparsity: float, ignore: Iterable[str], masks: Mapping[str, Tensor]):
        layers = {name: m for name, m in typed_layers(model).items() if not isinstance(m, SparseModule)}
        ignored = {name for names in match_names(ignore, list(layers)).values() for name in names}
        shared = _tied_parameters(model)
        readers = _children_of_readers(model)
        self.entries: dict[str, _Entry] = {}
        for name, module in layers.items():
            entry = _Entry(name, module, masks.get(weight_name(name)))
            entry.obstacle = entry.reason = self._obstacle(entry, shared, readers)
            if not entry.obstacle and name in ignored:
                entry.reason = "ignored"
            elif not entry.obstacle and (entry.sparsity < min_sparsity or entry.sparsity == 0.0):
                entry.reason = f"sparsity below {min_sparsity:.0%}" if min_sparsity else "no zeros"
                entry.joins = entry.sparsity == 0.0 and (_is_depthwise(module) or _reads_images(module))
            self.entries[name] = entry
        self.eligible = {name: entry for name, entry in self.entries.items() if not entry.reason}
        if any(isinstance(entry.module, nn.Conv2d) for entry in self.eligible.values()):
            joining = {name: entry for name, entry in self.entries.items() if entry.joins}
            self.eligible = {
                name: entry for name, entry in self.entries.items() if name in joining or name in self.eligible
            }

    def taken_out(self) -> Iterator[tuple[str, SparseModule]]:
        """The layers that are converted, each made when its turn comes; nothing here holds the dense ones then, so
        that a large model is not in memory in both forms."""
        self.eligible.clear()
        while self.entries:
            name, entry = next(iter(self.entries.items()))
            del self.entries[name]
            if entry.converted:
                yield name, entry.sparse()

    @staticmethod
    def _obstacle(entry: _Entry, shared: dict[int, list[str]], readers: dict[str, str]) -> str:
        module, weight, name = entry.module, entry.weight, entry.name
        if module._parameters.get("weight") is None:
            return "its weight is computed from others: torch.nn.utils.prune.remove or the like makes it plain"
        if isinstance(weight, UninitializedParameter):
            return "its weight is not initialised yet"
        if id(weight) in shared:
            return f"tied to {next(other for other in shared[id(weight)] if other != weight_name(name))}"
        if name in readers:
            return f"{readers[name]} reads its weight directly"
        if stock_type(module) not in (nn.Linear, nn.Conv2d) and not is_transformers_conv1d(module):
            return f"{type(module).__name__} has no sparse form"
        if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            return f"padding mode {module.padding_mode!r} has no sparse form"
        if not name:
            return "it is the whole model: use from_dense of SparseLinear or SparseConv2d"
        return ""


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _reads_images(module: nn.Module) -> bool:
    """Whether it is a network's first convolution, whose output is as large as its input is small."""
    return isinstance(module, nn.Conv2d) and module.in_channels <= IMAGE_CHANNELS and module.groups == 1


def _tied_parameters(model: nn.Module) -> dict[int, list[str]]:
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    unique = {name for name, _ in model.named_modules()}
    # A module that stands in two places is one user: only its first name counts.
    return {
        key: names
        for key, names in users.items()
        if len([name for name in names if name.rpartition(".")[0] in unique]) > 1
    }


def _children_of_readers(model: nn.Module) -> dict[str, str]:
    return {
        f"{parent}.{child}".lstrip("."): type(module).__name__
        for parent, module in model.named_modules()
        if isinstance(module, _READS_CHILDREN)
        for child, _ in module.named_children()
    }


def _input_shapes(model: nn.Module, entries: dict[str, _Entry], example_inputs) -> dict[str, torch.Size]:
    """Shape of the input of each layer that is called, from one forward pass in evaluation mode."""
    shapes: dict[str, torch.Size] = {}

    def record(name):
        def hook(module, args, kwargs):
            shapes[name] = (args[0] if args else next(iter(kwargs.values()))).shape

        return hook

    handles = [
        entry.module.register_forward_pre_hook(record(name), with_kwargs=True) for name, entry in entries.items()
    ]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return shapes


def _example_inputs(model: nn.Module):
    parameter = next(model.parameters())
    inner = getattr(model, "timm_model", model)
    config = getattr(inner, "pretrained_cfg", None)
    if isinstance(config, dict) and config.get("input_size"):
        image = parameter.new_zeros(16, *config["input_size"])
        return image if inner is model else {"pixel_values": image}
    model_config: Any = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) == "pixel_values" and hasattr(model_config, "image_size"):
        size = model_config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": parameter.new_zeros(16, getattr(model_config, "num_channels", 3), height, width)}
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        return dummy
    raise ValueError('policy="auto" measures the layers: give example_inputs (a batch), or use policy="always"')


def _called(candidates: _Candidates, shapes: dict[str, torch.Size] | None) -> list[_Entry]:
    """The layers that can be converted and that the example inputs reach; the others are told so."""
    for name, entry in candidates.eligible.items():
        if shapes is not None and name not in shapes:
            entry.reason = "not called with the example inputs"
    return [entry for name, entry in candidates.eligible.items() if shapes is None or name in shapes]


def _choose_all(candidates: _Candidates, shapes: dict[str, torch.Size] | None) -> None:
    for entry in _called(candidates, shapes):
        entry.converted = not entry.joins


@dataclass(frozen=True)
class _Use:
    """How a model is used, as far as timings depend on it."""

    trained: bool
    dtype: torch.dtype  # of activations

    @property
    def bf16(self) -> bool:
        return self.dtype == torch.bfloat16


def _choose_faster(candidates: _Candidates, shapes: dict[str, torch.Size], cache: TimingCache, use: _Use) -> None:
    activation = torch.empty(0, dtype=use.dtype)

    def measure(entries: list[_Entry], *, inside: bool) -> None:
        for entry in entries:
            sparse, shape = entry.sparse(), shapes[entry.name]
            if sparse.native_reason(activation) is not None:
                entry.reason = str(sparse.native_reason(activation))
                continue
            key = layer_key(sparse, shape, inside=inside, trained=use.trained, bf16=use.bf16)
            timing = cache.get(
                key, partial(time_layer, sparse, shape, inside=inside, trained=use.trained, bf16=use.bf16)
            )
            entry.dense_ms, entry.sparse_ms = timing.dense_ms, timing.sparse_ms
            entry.converted = timing.sparse_ms < timing.dense_ms
            entry.reason = "measured faster" if entry.converted else "measured slower than dense"

    called = _called(candidates, shapes)
    measure([entry for entry in called if not entry.joins], inside=False)
    if any(entry.converted and isinstance(entry.module, nn.Conv2d) for entry in called):
        # A convolution left dense among sparse ones pays for two changes of layout: look at those again,
        # and at layers without zeros that only run sparse to keep their neighbours' layout.
        measure([e for e in called if not e.converted and isinstance(e.module, nn.Conv2d)], inside=True)


def _check_whole(
    model: nn.Module, candidates: _Candidates, batch: Any, cache: TimingCache, use: _Use
) -> tuple[Timing | None, str]:
    """Makes layers dense again unless the whole model gains: what lies between them was not measured with them.

    Convolutions share a layout with all that is between them, so that they gain or lose together; linear layers
    are tried without them before the model is left dense.

    Returns:
        The last measurement, and what to say of it.
    """
    chosen = kept = [entry for entry in candidates.entries.values() if entry.converted]
    timing, failed = None, []
    while kept:
        sparsities = {entry.name: entry.sparsity for entry in kept}
        try:
            key = step_key(model, sparsities, batch, bf16=use.bf16)
            timing = cache.get(key, partial(_time_whole, model, kept, batch, bf16=use.bf16))
        except Exception as error:  # whatever the model raises when it is copied, or in training mode
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            logger.warning("the whole model could not be timed, its layers were chosen one by one (%s)", reason)
            return None, f"the whole model could not be timed, only its layers ({reason})"
        if timing.sparse_ms <= _WORTH * timing.dense_ms:
            break
        failed.append(f"{timing.sparse_ms:.1f} ms with {len(kept)} sparse layers")
        linear = [entry for entry in kept if not isinstance(entry.module, nn.Conv2d)]
        kept = linear if len(linear) < len(kept) else []
    if timing is None:
        return None, ""
    for entry in chosen:
        if entry not in kept:
            entry.converted, entry.reason = False, "measured faster, but the whole model was not"
    what = "forward and backward" if use.trained else "forward"
    dense = f"the whole model takes ({what}) {timing.dense_ms:.1f} ms dense"
    if not kept:
        return timing, f"left dense: {dense}, {' and '.join(failed)}"
    note = f"{dense}, {timing.sparse_ms:.1f} ms sparse: {timing.dense_ms / timing.sparse_ms:.2f} times as fast"
    return timing, f"{note}; convolutions are left dense: {failed[0]}" if failed else note


def _time_whole(model: nn.Module, entries: list[_Entry], batch: Any, *, bf16: bool) -> Timing:
    dense, sparse = copy.deepcopy(model), copy.deepcopy(model)
    _install(sparse, ((entry.name, copy.deepcopy(entry.sparse())) for entry in entries))
    return time_step(dense, sparse, batch, bf16=bf16)


_Places = dict[int, list[tuple[nn.Module, str]]]


def _places(model: nn.Module) -> _Places:
    """Where each module stands, by its id: in which modules, under which name. It holds none of them but parents."""
    places: _Places = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module is not None:
                places.setdefault(id(module), []).append((parent, child))
    return places


def _replace(places: _Places, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` stands."""
    for parent, child in places.pop(id(old)):
        parent._modules[child] = new


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    for attribute, hooks in vars(old).items():
        # The flag says of which kind the backward hooks are.
        if ("_hooks" in attribute and hooks) or attribute == "_is_full_backward_hook":
            new.__dict__[attribute] = hooks
