"""Checkpoints in dense layout, with what tells a reader and `sparse_ft` about the sparsity beside them."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TimmWrapperForImageClassification, TimmWrapperImageProcessor

import sparse_ft
from sparse_ft.channels import channels_removed, restore_channels
from sparse_ft.masks import SparsityReport, sparsity
from sparse_ft.masks.targets import unwrap
from sparse_ft.nn import SparseModule

from . import timm_models, transformers_models
from .bitmap import MASK_FILE, write_masks
from .card import model_card
from .compact import COMPACT_FOLDER
from .compact_folder import WEIGHTS, write_compact_folder
from .errors import ModelError
from .shards import MAX_SHARD_SIZE, size_in_bytes, stored_tensors, write_weights
from .staging import staged

INFO_FILE = "sparse_ft.json"
RECIPE_FILE = "recipe.yaml"
STALE_PATTERNS = (MASK_FILE, f"{COMPACT_FOLDER}/*", "model.safetensors.index.json", "model-*-of-*.safetensors")
"""Files that an earlier save may have left and that would contradict this one."""


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    processor: Any = None,
    label_names: Sequence[str] | None = None,
    metrics: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    card: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    compact: bool = True,
    values_dtype: torch.dtype | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
) -> None:
    """Save a sparse model so that stock timm or transformers, and `from_pretrained`, load it.

    Writes ``model.safetensors`` (dense layout), ``config.json``, ``sparse_ft.json`` (sparsity by layer, versions)
    and ``README.md`` (model card); the processor's files, ``recipe.yaml``, ``sparse_masks.safetensors`` (masks
    that the zeros do not tell) and ``sparse/`` (the compact form) where there is something to write. If the save
    fails, files that were there are as they were.

    Args:
        model: A timm model, a transformers model, or a timm model in transformers' wrapper, converted or dense; it
            is not changed. A wrapped timm model is saved in timm's layout, which both libraries load. What
            `remove_channels` took out is saved as zeros.
        directory: Made if it does not exist; files of other names in it stay.
        processor: Tokenizer or image processor to save along.
        label_names: Names of the classes; None keeps those that the model knows.
        metrics: Figures for the card and ``sparse_ft.json``, as ``{"accuracy": 0.91}``.
        recipe: Text of the recipe that the model was trained with.
        card: Entries of the model card, see `sparse_ft.hub.card.model_card`.
        extra: Further JSON entries of ``sparse_ft.json``, as ``{"method": ...}``.
        compact: Write the compact form too, where it is smaller by a quarter at least.
        values_dtype: float16 or bfloat16 rounds the values of the compact form, which halves it; None keeps them
            exact. The dense layout is exact either way.
        max_shard_size: Of one file of weights; a larger transformers model is split (timm reads no shards).

    Raises:
        ModelError: The model is of neither library, the labels are not as many as its classes, or its weights do not
            fit `values_dtype`.
        OSError: The files cannot be written.
    """
    inner: Any = unwrap(model)
    if channels_removed(inner):  # stock loaders build the architecture as it is
        inner = restore_channels(copy.deepcopy(inner))
    pretrained_cfg = None
    if isinstance(inner, TimmWrapperForImageClassification):
        pretrained_cfg = timm_models.wrapper_pretrained_cfg(inner)
        inner = inner.timm_model
    elif timm_models.is_timm_model(inner):
        pretrained_cfg = dict(inner.pretrained_cfg)
    elif not isinstance(inner, PreTrainedModel):
        raise ModelError(
            f"a {type(inner).__name__} is neither a timm nor a transformers model, so no loader could rebuild it; "
            "save its state_dict() yourself"
        )
    library = "timm" if pretrained_cfg is not None else "transformers"
    task = "image-classification" if pretrained_cfg is not None else transformers_models.task_of(inner)
    report = sparsity(inner)
    with staged(directory) as stage:
        if pretrained_cfg is not None:
            model_class = _save_timm(inner, stage, pretrained_cfg, processor, label_names)
        else:
            model_class = _save_transformers(inner, stage, label_names, max_shard_size)
        if processor is not None and not isinstance(processor, TimmWrapperImageProcessor):
            processor.save_pretrained(stage)
        masks = _masks_with_zeros(inner)
        if masks:
            write_masks(stage / MASK_FILE, masks)
        if recipe is not None:
            (stage / RECIPE_FILE).write_text(recipe, encoding="utf-8")
        has_compact = False
        if compact:
            try:
                has_compact = write_compact_folder(stage, stage / COMPACT_FOLDER, values_dtype=values_dtype)
            except ValueError as error:
                raise ModelError(str(error)) from error
        card = card or {}
        speed = {"speed": dict(card["speed"])} if card.get("speed") else {}
        info = info_text(report, library, model_class, metrics=metrics or {}, extra={**speed, **(extra or {})})
        (stage / INFO_FILE).write_text(info, encoding="utf-8")
        readme = model_card(
            library=library,
            model_class=model_class,
            task=task,
            report=report,
            metrics=metrics or {},
            recipe=recipe,
            has_compact=has_compact,
            card=card,
        )
        readme.save(stage / "README.md")
        saved = {path.relative_to(stage).as_posix() for path in stage.rglob("*")}
    for pattern in STALE_PATTERNS:
        for path in Path(directory).glob(pattern):
            if path.relative_to(directory).as_posix() not in saved:
                path.unlink()


def _save_timm(
    model: Any, stage: Path, pretrained_cfg: dict, processor: Any, label_names: Sequence[str] | None
) -> str:
    if label_names is not None:
        _check_labels(label_names, model.num_classes)
        pretrained_cfg = {**pretrained_cfg, "num_classes": model.num_classes, "label_names": list(label_names)}
    if isinstance(processor, TimmWrapperImageProcessor):
        pretrained_cfg = {**pretrained_cfg, **processor.data_config}
    config = timm_models.config_dict(model, pretrained_cfg)
    (stage / "config.json").write_text(json_text(config), encoding="utf-8")
    write_weights(stage, stored_tensors(model))
    return config["architecture"]


def _save_transformers(model: Any, stage: Path, label_names: Sequence[str] | None, max_shard_size: str | int) -> str:
    _write_as_transformers(model, stage, max_shard_size)
    if label_names is not None:
        _check_labels(label_names, model.config.num_labels)
        path = stage / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["id2label"] = {str(index): name for index, name in enumerate(label_names)}
        config["label2id"] = {name: index for index, name in enumerate(label_names)}
        path.write_text(json_text(config), encoding="utf-8")
    return type(model).__name__


def _write_as_transformers(model: Any, stage: Path, max_shard_size: str | int) -> None:
    """Write what `model.save_pretrained` writes, under the same names, without a dense copy of the model.

    transformers stores some weights under other names than the model has them under. It is given numbers in place of
    the tensors, and the names that these come back under are those of the files.
    """
    stored = stored_tensors(model)
    numbers: dict[int, Tensor] = {}
    tokens = [numbers.setdefault(id(entry), torch.tensor([index])) for index, entry in enumerate(stored.values())]
    entries = list(stored.values())
    try:
        model.save_pretrained(stage, state_dict=dict(zip(stored, tokens, strict=True)))
        named = load_file(stage / WEIGHTS)
    except (RuntimeError, ValueError, IndexError, TypeError):  # of operations on weights that are no numbers
        named = {}
    (stage / WEIGHTS).unlink(missing_ok=True)
    if sorted(int(number) for number in named.values() if number.shape == (1,)) != sorted(map(int, numbers.values())):
        # It joins or splits weights, which can only be done with the weights.
        model.save_pretrained(stage, max_shard_size=max_shard_size)
        return
    write_weights(stage, {name: entries[int(number)] for name, number in named.items()}, size_in_bytes(max_shard_size))


def _check_labels(label_names: Sequence[str], classes: int) -> None:
    if len(label_names) != classes:
        raise ModelError(f"there are {len(label_names)} label_names, but the model has {classes} classes")


def _masks_with_zeros(model: nn.Module) -> dict[str, Tensor]:
    """Masks of the sparse layers that train a weight which is 0.0 at present."""
    return {
        f"{name}.weight".lstrip("."): layer.mask()
        for name, layer in model.named_modules()
        if isinstance(layer, SparseModule) and bool(torch.any(layer.weight == 0))
    }


def info_text(
    report: SparsityReport, library: str, model_class: str, *, metrics: Mapping[str, Any], extra: Mapping[str, Any]
) -> str:
    """Text of ``sparse_ft.json``."""
    info = {
        "model": model_class,
        "library": library,
        "versions": {
            "sparse_ft": sparse_ft.__version__,
            **{name: version(name) for name in ("torch", "transformers", "timm")},
        },
        "metrics": dict(metrics),
        "sparsity": report.to_dict(),
    }
    clash = [name for name in extra if name in info]
    if clash:
        raise ModelError(f"extra may not replace the entry {clash[0]!r} of {INFO_FILE}")
    return json_text({**extra, **info})


def json_text(content: Mapping[str, Any]) -> str:
    """Indented JSON with lists of numbers on one line, for human readers."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    return re.sub(r"\[\s+([-\d.e,\s]+?)\s+\]", lambda match: f"[{' '.join(match[1].split())}]", text) + "\n"
