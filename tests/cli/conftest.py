"""Tiny models in folders, and the command line in this process."""

import sys
from pathlib import Path

import datasets
import pytest
import timm
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

import sparse_ft
from sparse_ft.cli import main

sys.path.append(str(Path(__file__).parents[1] / "data"))  # dataset_files


@pytest.fixture(autouse=True)
def quiet_libraries(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    logging.set_verbosity_warning()  # a Trainer of another test may have silenced all


@pytest.fixture
def run(capsys):
    """Runs a command; returns its exit status, stdout and stderr."""

    def call(*argv):
        capsys.readouterr()
        status = main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def image_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "resnet"
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay={"input_size": (3, 16, 16)})
    sparse_ft.prune(model, 0.8)
    sparse_ft.save_pretrained(model, folder)
    return folder


def make_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "plot", "the", "a", "was", "very"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", model_max_length=32
    )


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "bert"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    sparse_ft.prune(model, 0.8)
    sparse_ft.save_pretrained(model, folder, processor=make_tokenizer())
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    sparse_ft.prune(model, 0.8)
    sparse_ft.save_pretrained(model, folder, processor=make_tokenizer())
    return folder


@pytest.fixture
def reviews(tmp_path):
    rows = [("the film was good", "yes"), ("a very bad plot", "no"), ("good film", "yes"), ("bad", "no")] * 8
    path = tmp_path / "reviews.csv"
    path.write_text("text,label\n" + "\n".join(f"{text},{label}" for text, label in rows) + "\n")
    return path
