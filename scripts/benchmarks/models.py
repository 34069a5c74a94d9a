"""The networks that are measured, with random weights, pruned uniformly but for the stem and the classifier."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import sparse_ft


@dataclass(frozen=True)
class Workload:
    """A network at a sparsity, and its batch: images of `size` pixels squared, or texts of `size` tokens."""

    model: str
    sparsity: float
    batch: int
    size: int
    optimizer: str = "sgd"

    @property
    def name(self) -> str:
        """As in a case's name."""
        return f"{self.model}-{self.sparsity * 100:.0f}-b{self.batch}-{self.size}"

    @property
    def title(self) -> str:
        """As in a table."""
        shape = f"{self.batch} × {self.size} tokens" if self.model in TEXT else f"batch {self.batch}, {self.size}²"
        return f"{TITLES[self.model]}, {self.sparsity:.0%}, {shape}"

    def make(self) -> tuple[nn.Module, Any]:
        """The pruned dense model and a batch."""
        torch.manual_seed(0)
        model = TEXT[self.model]() if self.model in TEXT else timm.create_model(self.model)
        sparse_ft.prune(model, self.sparsity)
        if self.model in TEXT:
            tokens = torch.randint(0, model.config.vocab_size, (self.batch, self.size))
            labels = torch.randint(0, model.config.num_labels, (self.batch,))
            return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
        return model, torch.randn(self.batch, 3, self.size, self.size)


def _bert_base() -> nn.Module:
    return BertForSequenceClassification(BertConfig())


TEXT: dict[str, Callable[[], Any]] = {"bert-base": _bert_base}
TITLES = {
    "bert-base": "BERT-base",
    "mobilenetv1_100": "MobileNetV1",
    "resnet18": "ResNet-18",
    "resnet50": "ResNet-50",
    "vit_small_patch16_224": "ViT-S/16",
}
