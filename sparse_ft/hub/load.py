"""Models by name: from the Hub, a folder, timm or the package, ready to train natively."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparse_ft.conversion import convert as convert_layers
from sparse_ft.masks import prunable_layers
from sparse_ft.nn import SparseModule

from . import timm_models, transformers_models
from .bitmap import MASK_FILE, read_masks
from .compact import COMPACT_FOLDER
from .compact_folder import Reading, read_compact_folder
from .errors import ModelError
from .foreign import bitmask, fit, read_checkpoint, renamed
from .limits import check_config, check_file_size
from .source import Form, ModelSource, resolve

Masks = dict[str, Tensor]


def from_pretrained(
    name_or_path: str | Path,
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    task: str | None = None,
    convert: bool = True,
    policy: str = "auto",
    min_sparsity: float = 0.5,
    example_inputs: Any = None,
    for_trainer: bool = False,
    revision: str | None = None,
    token: str | None = None,
    pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    reference: str | Path | nn.Module | None = None,
    renames: Mapping[str, str] | None = None,
    zero_threshold: float = 0.0,
    form: Form = "auto",
) -> nn.Module:
    """A model with its sparse layers in native form.

    Args:
        name_or_path: A bundled name, a local folder, ``timm/ARCHITECTURE`` or a Hub id (see `resolve`).
        num_labels: Number of classes; another one than the checkpoint's gives the classifier new random weights.
            All other weights must fit.
        label_names: Their names; without `num_labels` their number counts.
        task: Hub task name, for transformers checkpoints that were saved for another one; None keeps theirs.
        convert: False leaves every layer dense, with its zeros.
        policy: ``"auto"`` keeps a layer dense where its sparse form is not faster on this machine; ``"always"``
            makes every layer of enough zeros sparse. See `sparse_ft.convert`.
        min_sparsity: Layers with fewer zeros than this fraction stay dense.
        example_inputs: An input batch to time the layers on, for policy ``"auto"``.
        for_trainer: Wrap a timm model in transformers' TimmWrapperForImageClassification, which takes
            ``pixel_values`` and ``labels``, as the Trainer needs. transformers models are the same either way.
        revision: Branch, tag or commit on the Hub.
        token: Hub token; None uses the one of the login, if any.
        pretrained: For ``timm/ARCHITECTURE``: timm's default pretrained weights in place of random ones.
        model_args: For ``timm/ARCHITECTURE`` without weights: arguments of `timm.create_model`.
        dtype: Of the parameters. The native kernels compute in float32.
        reference: Makes `name_or_path` a checkpoint file of another tool (see `docs/hub.md`), and says what model it
            is of: a name as above (a config.json is enough), or a model of any kind, which is filled and returned.
        renames: For a checkpoint file: regular expressions to be replaced in the names of its tensors.
        zero_threshold: In layers that have no mask of their own, weights of at most this size become zero.
        form: Which of the stored weights to read, ``"dense"`` or ``"compact"``; ``"auto"`` downloads the compact
            form alone where the repository has one, and of a folder reads the dense weights where it has such.

    Returns:
        The model, in the mode in which its library's own loader leaves it: timm's for training, transformers' for
        evaluation.

    Raises:
        ModelError: The model is not there, or cannot be used as asked; the message says why in one line.
    """
    model, masks = _load(
        name_or_path, num_labels, label_names, task, for_trainer, revision, token, pretrained, model_args, dtype,
        reference, renames, form,
    )  # fmt: skip
    if zero_threshold:
        zero_small_weights(model, zero_threshold, keep=masks)
    if convert:
        convert_layers(model, example_inputs, policy=policy, min_sparsity=min_sparsity, masks=masks)
    return model


def load_model(
    name_or_path: str | Path,
    *,
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    task: str | None = None,
    for_trainer: bool = False,
    revision: str | None = None,
    token: str | None = None,
    pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    reference: str | Path | nn.Module | None = None,
    renames: Mapping[str, str] | None = None,
    zero_threshold: float = 0.0,
    form: Form = "auto",
) -> nn.Module:
    """The dense model, zeros included: `from_pretrained` with ``convert=False``."""
    return from_pretrained(
        name_or_path,
        num_labels=num_labels,
        label_names=label_names,
        task=task,
        convert=False,
        for_trainer=for_trainer,
        revision=revision,
        token=token,
        pretrained=pretrained,
        model_args=model_args,
        dtype=dtype,
        reference=reference,
        renames=renames,
        zero_threshold=zero_threshold,
        form=form,
    )


def _load(
    name_or_path: str | Path,
    num_labels: int | None,
    label_names: Sequence[str] | None,
    task: str | None,
    for_trainer: bool,
    revision: str | None,
    token: str | None,
    pretrained: bool,
    model_args: Mapping[str, Any] | None,
    dtype: torch.dtype,
    reference: str | Path | nn.Module | None,
    renames: Mapping[str, str] | None,
    form: Form,
) -> tuple[nn.Module, Masks]:
    if renames and reference is None:
        raise ModelError("renames are for the checkpoint file of another tool: give a reference, too")
    if isinstance(reference, nn.Module):
        return _fill(reference, Path(name_or_path), renames or {})
    num_labels = _label_count(num_labels, label_names)
    source = resolve(
        name_or_path, revision=revision, token=token, pretrained=pretrained, reference=reference, form=form
    )
    given: tuple[dict[str, Tensor], Masks] | None = None
    if source.checkpoint is not None:
        assert reference is not None
        given = _read_foreign(source.checkpoint, reference, renames or {}, revision, token)
    if model_args and source.architecture is None:
        raise ModelError(f"model_args are for timm/ARCHITECTURE; {str(name_or_path)!r} has its own in config.json")
    if source.folder is not None and not _is_timm(_read_config(source.folder)):
        build = partial(
            transformers_models.load, source.folder, task=task, num_labels=num_labels, label_names=label_names,
            dtype=dtype,
        )  # fmt: skip
        if given is None and source.compact:
            model, masks = _built_meanwhile(build, source.folder / COMPACT_FOLDER)
        else:
            weights, masks = given or _read_weights(source)
            model = build(weights)
        return model, _fitting(masks, model, source.folder, new_labels=num_labels is not None)
    if task not in (None, "image-classification"):
        raise ModelError(f"{str(name_or_path)!r} is a timm model: its task is image-classification, not {task}")
    masks = {}
    if source.folder is None:
        assert source.architecture is not None
        if given is None:
            model = timm_models.create(source.architecture, num_labels, model_args or {})
        else:
            weights, masks = given
            model = timm_models.create_with(
                source.architecture, weights, num_labels, model_args or {}, str(name_or_path)
            )
            masks = _fitting(masks, model, Path(name_or_path), new_labels=num_labels is not None)
    else:
        weights, masks = given or _read_weights(source, own=True)
        if weights is None:
            weights = _read_safetensors(source.folder / "model.safetensors")
        model = timm_models.load(source.folder, weights, num_labels, hand_over=source.compact)
        masks = _fitting(masks, model, source.folder, new_labels=num_labels is not None)
    model.to(dtype)
    if label_names is not None:
        timm_models.set_labels(model, label_names)
    if for_trainer:
        model = timm_models.wrap(model)
        masks = {f"timm_model.{name}": mask for name, mask in masks.items()}
    return model, masks


def _label_count(num_labels: int | None, label_names: Sequence[str] | None) -> int | None:
    if num_labels is not None and num_labels < 1:
        raise ModelError(f"num_labels must be at least 1, not {num_labels}")
    if label_names is None:
        return num_labels
    if len(set(label_names)) != len(label_names):
        raise ModelError("label_names has a name twice")
    if num_labels not in (None, len(label_names)):
        raise ModelError(f"num_labels is {num_labels}, but there are {len(label_names)} label_names")
    return len(label_names)


def _read_config(folder: Path) -> dict[str, Any]:
    check_file_size(folder / "config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder}/config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder}/config.json must hold an object")
    check_config(config, f"{folder}/config.json")
    return config


def _is_timm(config: Mapping[str, Any]) -> bool:
    """Whether timm wrote the config, or transformers' TimmWrapper, which keeps timm's names."""
    return "architecture" in config and config.get("model_type", "timm_wrapper") == "timm_wrapper"


def zero_small_weights(model: nn.Module, threshold: float, keep: Mapping[str, Tensor] = MappingProxyType({})) -> None:
    """Sets weights of at most `threshold` to zero, in every layer that pruning would look at.

    Args:
        keep: masks by weight name; these layers stay as they are.

    Raises:
        ModelError: The threshold is negative or not a number.
    """
    if not 0.0 <= threshold < math.inf:
        raise ModelError(f"zero_threshold must be a number of at least 0, not {threshold}")
    for name, layer in prunable_layers(model).items():
        if f"{name}.weight" not in keep and not isinstance(layer, SparseModule):
            weight = cast(Tensor, layer.weight).data
            weight[weight.abs() <= threshold] = 0.0


def _read_foreign(
    path: Path, reference: str | Path, renames: Mapping[str, str], revision: str | None, token: str | None
) -> tuple[dict[str, Tensor], Masks]:
    """Weights and masks of a checkpoint file of another tool."""
    checkpoint = read_checkpoint(
        path, lambda: load_model(reference, revision=revision, token=token, dtype=torch.float32).state_dict()
    )
    return renamed(checkpoint.state_dict, renames), renamed(checkpoint.masks, renames)


def _fill(model: nn.Module, path: Path, renames: Mapping[str, str]) -> tuple[nn.Module, Masks]:
    """The model with the weights of a checkpoint file, and the file's masks."""
    checkpoint = read_checkpoint(path, model.state_dict)
    weights = fit(renamed(checkpoint.state_dict, renames), model.state_dict(), str(path))
    model.load_state_dict(weights, strict=False)  # `fit` is stricter
    return model, _fitting(renamed(checkpoint.masks, renames), model, path, new_labels=False)


def _read_weights(source: ModelSource, *, own: bool = False) -> tuple[dict[str, Tensor] | None, Masks]:
    """Weights that the model's own loader would not read, if those are meant, and the masks beside weights.

    Args:
        source: Where they are.
        own: Of a compact form, give tensors of memory that is nobody else's.
    """
    folder = source.folder
    assert folder is not None
    try:
        if source.compact:
            return read_compact_folder(folder / COMPACT_FOLDER, own=own)
        if bitmask.sparsity_format(_read_config(folder), str(folder)) is not None:
            return bitmask.read(folder)
        return None, read_masks(folder / MASK_FILE) if (folder / MASK_FILE).is_file() else {}
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(str(error)) from error


def _built_meanwhile(build: Callable[[dict[str, Tensor]], nn.Module], folder: Path) -> tuple[nn.Module, Masks]:
    """The model that `build` makes of a state dict, while the compact form in `folder` is decoded into that; masks."""
    random_state = torch.get_rng_state()  # a new classifier may be drawn
    try:
        reading = Reading(folder)
        try:
            model = build(reading.state_dict)
        finally:
            masks = reading.finish()
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(str(error)) from error
    if not reading.is_part_of(model):  # weights were converted or joined before they were there
        torch.set_rng_state(random_state)
        model = build(reading.state_dict)
    return model, masks


def _fitting(masks: Masks, model: nn.Module, folder: Path, *, new_labels: bool) -> Masks:
    """The stored masks, without that of a classifier that has been replaced.

    Raises:
        ModelError: A mask is of no weight of the model, or not of its shape, or the weight is nonzero outside it.
    """
    parameters = dict(model.named_parameters())
    fitting = {}
    for name, mask in masks.items():
        weight = parameters.get(name)
        if weight is None:
            raise ModelError(f"{folder}: there is a mask for {name}, but the model has no such weight")
        if mask.shape != weight.shape:
            if new_labels and mask.shape[1:] == weight.shape[1:]:
                continue
            raise ModelError(
                f"{folder}: the mask of {name} has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}"
            )
        if torch.any(weight.detach()[~mask]):
            raise ModelError(f"{folder}: {name} has nonzero weights outside its mask; delete {MASK_FILE} to ignore it")
        fitting[name] = mask
    return fitting


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged: {error}") from error
