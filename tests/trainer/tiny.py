"""Tiny pruned models and data for trainer tests: a step takes milliseconds."""

import timm
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, ResNetConfig, ResNetForImageClassification

from sparse_ft import SparseTrainer, SparseTrainingArguments
from sparse_ft.masks import prune


def pruned(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    prune(model, sparsity)
    return model


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=4
    )
    return ResNetForImageClassification(config)


def bert(seed: int = 0, dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def timm_resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_resnet", num_classes=4)


class Images(torch.utils.data.Dataset):
    """Four classes that differ in brightness."""

    def __init__(self, count: int = 24, size: int = 16):
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(count) % 4
        noise = torch.randn(count, 3, size, size, generator=generator)
        self.images = noise * 0.3 + self.labels.view(-1, 1, 1, 1) - 1.5

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": int(self.labels[i])}


class Texts(torch.utils.data.Dataset):
    """Three classes that differ in their first token."""

    def __init__(self, count: int = 24, length: int = 10):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 40, (count, length), generator=generator)
        self.labels = torch.arange(count) % 3
        self.ids[:, 0] = self.labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {
            "input_ids": self.ids[i],
            "attention_mask": torch.ones_like(self.ids[i]),
            "labels": int(self.labels[i]),
        }


def data_for(model: nn.Module) -> torch.utils.data.Dataset:
    return Texts() if isinstance(model, BertForSequenceClassification) else Images()


def make_trainer(model: nn.Module, output_dir, *, trainer_options=None, **arguments) -> SparseTrainer:
    options = {
        "sparse_policy": "always",
        "per_device_train_batch_size": 6,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "keep_freed_memory": False,
    } | arguments
    args = SparseTrainingArguments(output_dir=str(output_dir), **options)
    dataset = data_for(model)
    return SparseTrainer(model, args, train_dataset=dataset, eval_dataset=dataset, **(trainer_options or {}))


def losses(trainer: SparseTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
