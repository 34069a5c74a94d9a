"""Texts: tokenised for classification, or joined and cut into blocks for causal language modelling."""

from collections.abc import Sequence
from typing import Any

import datasets
from torch import nn

from .columns import Columns
from .errors import DataError
from .splits import Split

DEFAULT_LENGTH = {"text-classification": 128, "text-generation": 256}


def resolve_length(model: nn.Module, tokenizer: Any, task: str, max_length: int | None) -> int:
    """Returns the sequence length in tokens: what was asked for, else the task's default within the model's limit.

    Raises:
        DataError: more was asked for than the model has positions.
    """
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    limit = min(limit for limit in limits if limit is not None)
    if max_length is None:
        return min(DEFAULT_LENGTH[task], limit)
    if max_length > limit:
        raise DataError(f"max length {max_length} is more than the {limit} tokens that the model takes")
    return max_length


def ensure_pad_token(model: nn.Module, tokenizer: Any) -> str | None:
    """Lets a tokenizer without a padding token pad with its end token; returns a note when it did."""
    note = None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has neither a padding nor an end token; give it a pad_token")
        tokenizer.pad_token = tokenizer.eos_token
        note = f"the tokenizer has no padding token: {tokenizer.eos_token!r} is used"
    config: Any = model.config
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id
    return note


def tokenize_for_classification(split: Split, columns: Columns, tokenizer: Any, max_length: int) -> datasets.Dataset:
    """Returns rows of `input_ids`, `attention_mask` (and what else the tokenizer gives) and `labels`, not padded."""
    _check_texts(split, columns)

    def tokenize(rows: dict[str, list[Any]]) -> Any:
        return tokenizer(*(rows[name] for name in columns.text), truncation=True, max_length=max_length)

    tokenized = split.rows.map(tokenize, batched=True, remove_columns=split.rows.column_names, desc="tokenizing")
    return tokenized if split.labels is None else tokenized.add_column("labels", split.labels)


def tokenize_for_generation(split: Split, columns: Columns, tokenizer: Any, length: int) -> datasets.Dataset:
    """Returns rows of `input_ids` of exactly `length` tokens, with `labels` equal to them.

    Texts are joined with the end token between them, lines of a running text (which keep their line break) without
    it; the tail shorter than a block is dropped.
    """
    _check_texts(split, columns)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        texts = rows[columns.text[0]]
        tokens = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        return {
            "input_ids": [ids if text.endswith("\n") else ids + end for text, ids in zip(texts, tokens, strict=True)]
        }

    def cut(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined = [token for ids in rows["input_ids"] for token in ids]
        blocks = [joined[i : i + length] for i in range(0, len(joined) - length + 1, length)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    ids = split.rows.map(tokenize, batched=True, remove_columns=split.rows.column_names, desc="tokenizing")
    # One batch, so that only one tail is dropped in a split.
    blocks = ids.map(cut, batched=True, batch_size=None, remove_columns=ids.column_names, desc="cutting into blocks")
    if len(blocks) == 0:
        raise DataError(f"the {split.name} split has fewer than {length} tokens: no block can be made of it")
    return blocks


def _check_texts(split: Split, columns: Columns) -> None:
    for name in columns.text:
        for row, text in enumerate(_column(split.rows, name)):
            if not isinstance(text, str):
                raise DataError(f"row {row} of the {split.name} split has no text in column {name!r}")


def _column(rows: datasets.Dataset, name: str) -> Sequence[Any]:
    return rows.select_columns(name).to_dict()[name]
