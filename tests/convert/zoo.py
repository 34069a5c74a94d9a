"""Networks of timm and transformers with random weights, and a batch for each; no download."""

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 90


def image(size: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def _tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 14))


def classified() -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(), "attention_mask": torch.ones(3, 14).long(), "labels": torch.tensor([0, 1, 1])}


def written() -> dict[str, torch.Tensor]:
    tokens = _tokens()
    return {"input_ids": tokens, "labels": tokens}


def _timm(name: str, **options) -> nn.Module:
    return timm.create_model(name, num_classes=10, **options)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def distilbert() -> nn.Module:
    config = DistilBertConfig(
        vocab_size=VOCABULARY, dim=48, n_layers=2, n_heads=3, hidden_dim=96, max_position_embeddings=32, dropout=0.0,
        attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    return DistilBertForSequenceClassification(config)


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    return ViTForImageClassification(config)


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=48, n_layer=2, n_head=3, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def small_resnet() -> nn.Module:
    return _timm("resnet18", layers=(1, 1, 1, 1), channels=(8, 16, 24, 32))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "resnet18": (partial(_timm, "resnet18"), partial(image, 48)),
    "resnet50": (partial(_timm, "resnet50"), partial(image, 48)),
    "mobilenetv1_100": (partial(_timm, "mobilenetv1_100"), partial(image, 64)),
    "efficientnet_b0": (partial(_timm, "efficientnet_b0"), partial(image, 64)),
    "convnext_atto": (partial(_timm, "convnext_atto"), partial(image, 64)),
    "vit_tiny_patch16_224": (partial(_timm, "vit_tiny_patch16_224"), partial(image, 224, 1)),
    "bert": (bert, classified),
    "distilbert": (distilbert, classified),
    "vit": (vit, lambda: {"pixel_values": image(32), "labels": torch.tensor([0, 1, 2, 3])}),
    "gpt2": (gpt2, written),
    "llama": (llama, written),
}


def loss_and_logits(model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        logits = model(batch)
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[-1]), logits
    outputs = model(**batch)
    return outputs.loss, outputs.logits
