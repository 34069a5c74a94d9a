"""A config.json cannot make more than its weights do."""

import json
import resource

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_bert, tiny_resnet
from torch import nn

from sparse_ft.hub import ModelError, load_model, save_pretrained
from sparse_ft.hub.limits import Budget, check_config

HUGE = [
    ("timm", {"architecture": "vit_giant_patch14_224", "model_args": {}}, "numbers"),
    ("timm", {"model_args": {"layers": [10**9, 1, 1, 0]}}, "'layers' is 1000000000"),
    ("timm", {"model_args": {"layers": [9_999, 1, 1, 0], "channels": [1, 1, 1, 1]}}, "parts"),
    ("timm", {"model_args": {"channels": [10**6, 16, 16, 16], "layers": [1, 1, 1, 0]}}, "numbers"),
    ("timm", {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 10**6}}, "numbers"),
    ("transformers", {"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000"),
    ("transformers", {"num_hidden_layers": 9_999}, "parts"),
    ("transformers", {"hidden_size": 2**20, "num_attention_heads": 2}, "numbers"),
    ("transformers", {"vocab_size": 10**12}, "numbers"),
    ("transformers", {"max_position_embeddings": 10**11}, "numbers"),
    ("transformers", {"num_labels": 10**9}, "'num_labels' is 1000000000"),
]


@pytest.mark.parametrize(("kind", "change", "message"), HUGE)
def test_configs_of_giants(tmp_path, kind, change, message):
    torch.set_num_threads(1)
    save_pretrained(tiny_resnet() if kind == "timm" else tiny_bert(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024, "KiB"


def test_budget_counts_one_thread_and_ends(tmp_path):
    budget = Budget(parts=6, numbers=100)
    with budget.enforced():
        nn.Linear(9, 9)
    with budget.enforced(), pytest.raises(ModelError, match="more than 100 numbers"):
        nn.Linear(10, 10)
    with budget.enforced(), pytest.raises(ModelError, match="more than 6 parts"):
        nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1))
    nn.Linear(100, 100)


def test_budget_of_a_folder_is_that_of_its_tensors(tmp_path):
    save_pretrained(tiny_bert(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert Budget.of_folder(tmp_path) == Budget.of_tensors(tensor.numel() for tensor in tensors.values())


def test_configs_of_large_models_pass():
    check_config(
        {
            "num_hidden_layers": 200,
            "vocab_size_per_layer_input": 262_144,
            "max_position_embeddings": 10_485_760,
            "block_size": 131_072,
            "label2id": {"layer cake": 21_000, "num_layers": 15_000},
            "num_labels": 21_843,
            "rope_theta": 10_000_000,
            "text_config": {"num_layers": 80, "layer_types": ["full"] * 80},
        },
        "here",
    )
