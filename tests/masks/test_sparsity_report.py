import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import matplotlib
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import sparse_ft
from sparse_ft.masks import mask_state, prune, sparsity


@pytest.fixture
def model() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 2))
    prune(model, 0.75)
    return model


def test_totals(model):
    report = sparsity(model)
    assert [(layer.name, layer.numel, layer.nnz, layer.note) for layer in report.layers] == [
        ("0", 216, 216, "stem (left dense)"),
        ("1", 576, 144, ""),
        ("3", 16, 16, "classifier head (left dense)"),
    ]
    assert report.overall == pytest.approx(432 / 808)
    assert report.overall_pruned == 0.75


def test_model_without_layers_or_zeros():
    assert sparsity(nn.ReLU()).overall == 0.0
    assert sparsity(nn.Linear(2, 2)).overall_pruned == 0.0
    assert str(sparsity(nn.ReLU())).endswith("0.00%")


def test_table(model):
    lines = str(sparsity(model)).splitlines()
    assert lines[0].split() == ["layer", "kind", "shape", "nonzeros", "weights", "sparsity", "note"]
    assert lines[3].split() == ["1", "Conv2d", "8x8x3x3", "144", "576", "75.00%"]
    assert lines[-1].split()[:4] == ["total", "376", "808", "53.47%"]


def test_dict_is_json(model):
    read = json.loads(json.dumps(sparsity(model).to_dict()))
    assert read["sparsity_of_pruned_layers"] == 0.75
    assert read["layers"][1] == {
        "name": "1", "kind": "Conv2d", "shape": [8, 8, 3, 3], "nnz": 144, "numel": 576, "sparsity": 0.75, "note": "",
    }  # fmt: skip


def test_html_escapes_names():
    model = nn.Module()
    model.add_module("<script>alert(1)</script>", nn.Linear(2, 2))
    fragment = sparsity(model).to_html()
    assert "<script>" not in fragment and "&lt;script&gt;" in fragment
    assert len(ElementTree.fromstring(fragment).findall("tbody/tr")) == 1


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(model, tmp_path, suffix):
    backend = matplotlib.get_backend(auto_select=False)
    sparsity(model).plot(tmp_path / f"plot.{suffix}")
    content = (tmp_path / f"plot.{suffix}").read_bytes()
    assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml"}[suffix])
    assert matplotlib.get_backend(auto_select=False) == backend


def test_plot_takes_names_literally(tmp_path):
    model = nn.Module()
    model.add_module("$\\frac{", nn.Linear(2, 2))
    sparsity(model).plot(tmp_path / "plot.svg")


def test_mask_state_of_dense_layers(model):
    masks = mask_state(model)
    assert list(masks) == ["1.weight"]
    assert torch.equal(masks["1.weight"], model[1].weight != 0)


def test_all_zero_weight_is_no_mask():
    linear = nn.Linear(4, 4)
    nn.init.zeros_(linear.weight)
    assert mask_state(linear) == {}


def test_native_layers_count_like_their_dense_form():
    model = nn.Sequential(nn.Linear(32, 16), Conv1D(16, 16), nn.Conv2d(4, 4, 3), nn.Linear(16, 2))
    prune(model, 0.9, ignore=["3"])
    dense, masks = sparsity(model), mask_state(model)
    sparse_ft.convert(model, policy="always")
    native = sparsity(model)
    for before, after in zip(dense.layers, native.layers, strict=True):
        assert replace(before, kind="") == replace(after, kind="")
    assert [layer.kind for layer in native.layers[:3]] == ["SparseLinear", "SparseLinear", "SparseConv2d"]
    assert {name: mask.tolist() for name, mask in mask_state(model).items()} == {
        name: mask.tolist() for name, mask in masks.items()
    }


def test_active_zero_of_a_native_layer_is_a_zero_inside_the_mask():
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 2))
    prune(model, 0.5)
    sparse_ft.convert(model, policy="always")
    model[0].weight.data[0] = 0.0
    assert sparsity(model).layers[0].nnz == 255
    assert int(mask_state(model)["0.weight"].sum()) == 256


def test_shared_weight_counts_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert sparsity(model).numel == 16


def test_parametrised_weight_is_counted():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.LazyLinear(2))
    assert sparsity(model).numel == 16
    assert mask_state(model) == {}
