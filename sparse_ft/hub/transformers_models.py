"""transformers models: which class a checkpoint folder asks for, and its weights loaded without silent losses."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .errors import ModelError, one_line
from .limits import Budget

TASKS: dict[str, Mapping[str, str | Sequence[str]]] = {
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "text-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question-answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "fill-mask": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "text-generation": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
"""For each task name of the Hub, the names of transformers' model classes by model type."""


def task_of(model: nn.Module) -> str | None:
    """Task name of the Hub for a model, None for one of a class that is not in `TASKS`."""
    return _task_of_class(type(model).__name__)


def _task_of_class(name: str) -> str | None:
    for task, classes in TASKS.items():
        if any(name == entry or (not isinstance(entry, str) and name in entry) for entry in classes.values()):
            return task
    return None


def load(
    folder: Path,
    state_dict: Mapping[str, Tensor] | None,
    *,
    task: str | None,
    num_labels: int | None,
    label_names: Sequence[str] | None,
    dtype: torch.dtype,
) -> nn.Module:
    """The model that the config.json of `folder` describes.

    Args:
        folder: Holds config.json, and model.safetensors (or its shards) unless `state_dict` is given.
        state_dict: Weights to take in place of the folder's.
        task: A key of `TASKS`; None takes the class that the checkpoint was saved with.
        num_labels: Another number than the checkpoint's gives the classifier new weights.
        label_names: Names of the labels, as many as there are.
        dtype: Of the parameters.

    Raises:
        ModelError: The architecture or the task is unknown, or a weight outside the classifier does not fit.
    """
    config = _config(folder)
    if state_dict is not None and hasattr(config, "quantization_config"):
        del config.quantization_config  # it says how the folder's own file is packed
    new_labels = num_labels is not None and num_labels != config.num_labels
    if new_labels or label_names is not None:
        names = label_names or [f"LABEL_{index}" for index in range(num_labels or 0)]
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
    model_class = _model_class(folder, config, task, with_labels=num_labels is not None)
    given = None if state_dict is None else dict(state_dict)
    budget = Budget.of_folder(folder) if given is None else Budget.of_tensors(t.numel() for t in given.values())
    try:
        with budget.enforced():
            model, info = model_class.from_pretrained(
                folder if given is None else None,
                config=config,
                state_dict=given,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # each mismatch is judged below
                output_loading_info=True,
            )
    except Exception as error:  # whatever a stranger's settings make an architecture raise
        raise ModelError(f"{folder}: {one_line(error)}") from error
    body = f"{model.base_model_prefix}."
    for name, found, expected in sorted(info["mismatched_keys"]):
        if not new_labels or name.startswith(body):
            raise ModelError(
                f"{folder}: {name} has shape {tuple(found)} in the weights file, but the model needs {tuple(expected)}"
            )
    of_body = [name for name in model.state_dict() if name.startswith(body)]
    if of_body and set(of_body) <= set(info["missing_keys"]):
        raise ModelError(f"{folder}: the weights file holds none of the weights of {model_class.__name__}")
    if state_dict is not None:
        _check_complete(info, model, folder, new_labels or task is not None or num_labels is not None)
    return model


def _check_complete(info: Mapping[str, Any], model: Any, folder: Path, new_head: bool) -> None:
    """Weights that were given are all the weights, but for those of a new head.

    Raises:
        ModelError: A weight of the model is missing, or a given one has no place.
    """
    body = f"{model.base_model_prefix}."
    missing = sorted(name for name in info["missing_keys"] if not new_head or name.startswith(body))
    unknown = sorted(name for name in info["unexpected_keys"] if not new_head or name.startswith(body))
    if missing:
        raise ModelError(f"{folder}: the weights lack {missing[0]}, which {type(model).__name__} needs")
    if unknown:
        raise ModelError(f"{folder}: {type(model).__name__} has no place for the weight {unknown[0]}")


def create(config_file: Path) -> nn.Module:
    """The model that a configuration in JSON describes, with random weights.

    `model_type` is enough; `architectures` names the class where several would fit.

    Raises:
        ModelError: The architecture is unknown, or the configuration asks for what it cannot be.
    """
    config = _config(config_file)
    model_class = _model_class(config_file, config, None, with_labels=False)
    try:
        return model_class._from_config(config)
    except Exception as error:  # whatever settings make an architecture raise
        raise ModelError(f"{config_file}: {one_line(error)}") from error


def _config(path: Path) -> PretrainedConfig:
    """From a folder's config.json, or a file."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as above
        raise ModelError(f"{path}{'/config.json' if path.is_dir() else ''}: {one_line(error)}") from error


def _model_class(folder: Path, config: PretrainedConfig, task: str | None, *, with_labels: bool) -> Any:
    if task is None:
        names = config.architectures or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ModelError(f"{folder}/config.json: architectures must list names of classes")
        saved_as = getattr(transformers, names[0], None) if names else None
        saved_task = _task_of_class(names[0]) or "" if names else ""
        is_model = isinstance(saved_as, type) and issubclass(saved_as, PreTrainedModel)
        if is_model and (not with_labels or saved_task.endswith("-classification")):
            return saved_as
        # A language model or a bare encoder that is to get labels: the one classification task it is made for.
        fitting = [
            name for name in ("image-classification", "text-classification") if config.model_type in TASKS[name]
        ]
        if len(fitting) != 1:
            raise ModelError(f"{folder}: give the task of this {config.model_type} model, one of {', '.join(TASKS)}")
        task = fitting[0]
    if task not in TASKS:
        raise ModelError(f"unknown task {task!r}; known tasks: {', '.join(TASKS)}")
    if config.model_type not in TASKS[task]:
        raise ModelError(f"{folder}: transformers has no {config.model_type} model for the task {task}")
    entry = TASKS[task][config.model_type]
    return getattr(transformers, entry if isinstance(entry, str) else entry[0])
