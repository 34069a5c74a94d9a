"""Models for commands that do not train: loaded dense, with inputs to run them on."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.hub import load_model, resolve
from sparse_ft.hub.foreign import CHECKPOINT_SUFFIXES
from sparse_ft.hub.transformers_models import create, task_of


def quieten_loading() -> None:
    """No progress bars for reading and writing weights, which take a moment; training keeps its own."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def origin(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `options.add_model_options` as arguments of `from_pretrained` beside the name."""
    return {
        "pretrained": args.pretrained,
        "revision": args.revision,
        "reference": args.reference,
        "renames": dict(args.rename),
        "zero_threshold": args.zero_threshold,
    }


def load_dense(args: argparse.Namespace) -> nn.Module:
    """The model that the options name, in dense form with its zeros."""
    quieten_loading()
    return load_model(args.model, **origin(args))


def load_or_create(args: argparse.Namespace) -> nn.Module:
    """As `load_dense`; a file stands for the transformers configuration in it, with random weights."""
    path = Path(args.model)
    return create(path) if path.is_file() and not path.name.endswith(CHECKPOINT_SUFFIXES) else load_dense(args)


def processor_beside(args: argparse.Namespace) -> Any:
    """Tokenizer or image processor of the model's folder, to be saved along; None if there is none."""
    from transformers import AutoImageProcessor, AutoTokenizer

    folder = resolve(args.model, pretrained=args.pretrained, revision=args.revision, reference=args.reference).folder
    if folder is None:
        return None
    if (folder / "preprocessor_config.json").is_file():
        return AutoImageProcessor.from_pretrained(folder)
    if (folder / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    return None


def example_batch(
    model: nn.Module, batch_size: int, *, image_size: int | None = None, seq_len: int | None = None
) -> dict[str, Tensor] | Tensor:
    """A random batch of the model's own input shape.

    Args:
        image_size: side length in pixels instead of the model's own.
        seq_len: tokens instead of 128 (or the model's limit, where that is less).

    A transformers model that classifies or writes gets labels, too, so that it computes its own loss.
    """
    from sparse_ft.data.images import image_spec

    generator = torch.Generator().manual_seed(0)
    config: Any = getattr(model, "config", None)
    task = task_of(model)
    classes = {"labels": torch.randint(0, config.num_labels, (batch_size,), generator=generator)} if (
        task in ("image-classification", "text-classification")) else {}  # fmt: skip
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        spec = image_spec(model, image_size=image_size)
        images = torch.randn(batch_size, spec.channels, *spec.size, generator=generator)
        return images if config is None else {"pixel_values": images, **classes}
    length = seq_len or min(128, getattr(config, "max_position_embeddings", None) or 128)
    tokens = torch.randint(0, vocabulary, (batch_size, length), generator=generator)
    written = {"labels": tokens} if task in ("text-generation", "fill-mask") else classes
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **written}
