"""The smallest models that have every kind of layer the tests are about; random weights, no download."""

import timm
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import sparse_ft

IMAGE_SIZE = 64


def tiny_resnet(
    *, num_classes: int = 10, sparsity: float = 0.9, channels: tuple[int, ...] = (8, 16, 16, 16)
) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "resnet18",
        layers=(1, 1, 1, 0),
        channels=channels,
        num_classes=num_classes,
        pretrained_cfg_overlay={"input_size": (3, IMAGE_SIZE, IMAGE_SIZE), "mean": (0.4, 0.5, 0.6)},
    )
    sparse_ft.prune(model, sparsity)
    return model.eval()


def tiny_bert(*, num_labels: int = 3, sparsity: float = 0.9) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=120,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        num_labels=num_labels,
    )
    model = BertForSequenceClassification(config)
    sparse_ft.prune(model, sparsity)
    return model.eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def tokens() -> torch.Tensor:
    return torch.arange(24).view(2, 12)
