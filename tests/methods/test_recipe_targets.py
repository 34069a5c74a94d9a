"""Which parameters a recipe names."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_ft.methods.targets import ALL, ALL_PRUNABLE, find_targets, unusual_targets


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(1, 2, 3)
        self.up = nn.ConvTranspose2d(2, 2, 2)
        self.norm = nn.BatchNorm2d(2)
        self.lstm = nn.LSTM(4, 4)
        self.hidden = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight  # tied


def test_tokens():
    model = Mixed()
    assert list(find_targets(model, ALL_PRUNABLE)) == ["embed.weight", "conv.weight", "up.weight", "hidden.weight"]
    every = list(find_targets(model, ALL))
    assert every == [name for name, _ in model.named_parameters()]


def test_names_and_patterns():
    model = Mixed()
    assert list(find_targets(model, ["hidden", "conv.weight"])) == ["conv.weight", "hidden.weight"]
    assert list(find_targets(model, ["re:hidden"])) == ["hidden.weight", "hidden.bias"]  # matched from the beginning
    assert list(find_targets(model, ["re:.*weight$"], ["re:.*orm", "embed"]))[:2] == ["conv.weight", "up.weight"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_wrappers(wrap):
    wrapped = wrap(Mixed())
    assert list(find_targets(wrapped, ["module.hidden.weight"])) == ["hidden.weight"]
    assert list(find_targets(wrapped, ["re:module.hid.*weight"])) == ["hidden.weight"]


def test_names_of_a_timm_model_in_its_wrapper():
    wrapped = nn.ModuleDict({"timm_model": Mixed()})
    for entry in (
        "hidden",
        "timm_model.hidden.weight",
        "re:hid.*weight",
        "re:timm_model.hid.*weight",
        "module.hidden",
    ):
        assert list(find_targets(wrapped, [entry])) == ["timm_model.hidden.weight"]


def test_transformers_conv1d_is_prunable_and_transposed():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=11, n_positions=4))
    targets = find_targets(model, ALL_PRUNABLE)
    assert targets["transformer.h.0.mlp.c_fc.weight"].transposed
    assert "lm_head.weight" not in targets  # tied to the embedding, which is named first
    assert unusual_targets(model, targets)["transformer.wte.weight"] == "embedding"


def test_what_is_usually_left_dense():
    found = unusual_targets(Mixed(), find_targets(Mixed(), ALL_PRUNABLE))
    assert found == {"embed.weight": "embedding", "conv.weight": "stem"}


def test_nothing_matches():
    with pytest.raises(
        ValueError, match="'hidde.weight' matches no parameter of the model; names of the model are hidden"
    ):
        find_targets(Mixed(), ["hidde.weight"])
