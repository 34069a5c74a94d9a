"""Fits a dataset to a model: transforms, tokens, collator and metrics, ready for `Trainer`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import DataError
from .images import Augment, ImageCollator, ImageDataset, eval_transform, image_spec, record_spec, train_transform
from .load import Data
from .texts import ensure_pad_token, resolve_length, tokenize_for_classification, tokenize_for_generation


@dataclass(frozen=True)
class PreparedData:
    """What `Trainer` takes.

    Attributes:
        train, eval: datasets that yield examples.
        collator: examples -> batch.
        processor: tokenizer or image processor to be saved with the model; None for plain timm models.
        compute_metrics, preprocess_logits: metrics of the task (`accuracy`), or None where the loss is the metric.
        notes: what was decided for the user, one sentence each.
    """

    train: Any
    eval: Any
    collator: Callable[[Any], dict[str, Any]]
    processor: Any = None
    compute_metrics: Callable[[Any], dict[str, float]] | None = None
    preprocess_logits: Callable[[Any, Any], Any] | None = None
    notes: list[str] = field(default_factory=list)


def prepare(
    data: Data,
    model: nn.Module,
    processor: Any = None,
    *,
    augment: Augment = "auto",
    image_size: int | None = None,
    max_length: int | None = None,
    seed: int = 42,
) -> PreparedData:
    """Fits `data` to `model`, and records in the model's description how images are sized and cut.

    Args:
        data: from `load_data`.
        model: a timm model or a transformers model for the task.
        processor: its image processor or tokenizer. Needed for text; images do without.
        augment: distortion of training images: `none`, `light` (random crop of at least 70 % of the area, mirror),
            `standard` (at least 8 %, ImageNet's). `auto` is `light`.
        image_size: side length in pixels instead of the model's own.
        max_length: tokens per text instead of the task's default.
        seed: of the random transforms.

    Raises:
        DataError: the data and the model do not fit.
    """
    if data.task == "image-classification":
        return _prepare_images(data, model, processor, augment, image_size, seed)
    if processor is None:
        raise DataError(f"task {data.task} needs a tokenizer, and the model comes without one")
    return _prepare_texts(data, model, processor, max_length)


def _prepare_images(
    data: Data, model: nn.Module, processor: Any, augment: Augment, image_size: int | None, seed: int
) -> PreparedData:
    column = data.columns.image
    assert column is not None
    spec = image_spec(model, processor, image_size=image_size, glyphs=data.glyphs)
    record_spec(model, processor, spec)
    return PreparedData(
        train=ImageDataset(
            data.train, column, train_transform(spec, augment, data.glyphs), channels=spec.channels, seed=seed
        ),
        eval=ImageDataset(data.eval, column, eval_transform(spec), channels=spec.channels),
        collator=ImageCollator(spec.mean, spec.std),
        processor=processor,
        compute_metrics=accuracy,
        preprocess_logits=predicted_class,
    )


def _prepare_texts(data: Data, model: nn.Module, tokenizer: Any, max_length: int | None) -> PreparedData:
    from transformers import DataCollatorWithPadding, default_data_collator

    length = resolve_length(model, tokenizer, data.task, max_length)
    if data.task == "text-generation":
        return PreparedData(
            train=tokenize_for_generation(data.train, data.columns, tokenizer, length),
            eval=tokenize_for_generation(data.eval, data.columns, tokenizer, length),
            collator=default_data_collator,
            processor=tokenizer,
        )
    note = ensure_pad_token(model, tokenizer)
    return PreparedData(
        train=tokenize_for_classification(data.train, data.columns, tokenizer, length),
        eval=tokenize_for_classification(data.eval, data.columns, tokenizer, length),
        collator=DataCollatorWithPadding(tokenizer),
        processor=tokenizer,
        compute_metrics=accuracy,
        preprocess_logits=predicted_class,
        notes=[note] if note else [],
    )


def predicted_class(logits: Any, labels: Any) -> torch.Tensor:
    """The class of the largest logit, so that evaluation need not keep all logits."""
    if isinstance(logits, tuple):
        logits = logits[0]
    return logits.argmax(dim=-1)


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of examples whose predicted class is the label, 0..1."""
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}
