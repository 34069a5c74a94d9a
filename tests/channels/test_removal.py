"""Channels that are dead are taken out: the same outputs, smaller layers, and back again."""

import copy

import pytest
import timm
import torch
from networks import NETWORKS, make

import sparse_ft
from sparse_ft.channels import (
    ChannelError,
    analyze_channels,
    channels_removed,
    dead_units,
    remove_channels,
    restore_channels,
    silence,
)


def silenced(name, seed=0):
    """A network with half of its units dead."""
    model, images = make(name)
    channels = analyze_channels(model, images)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(channels.count, generator=generator) < 0.5
    kept = channels.with_floor(kept, 1, torch.zeros(channels.count))
    silence(model, channels, ~kept)
    return model, images, channels, kept


@pytest.mark.parametrize("name", NETWORKS)
def test_removed_equals_masked(name):
    model, images, channels, kept = silenced(name)
    assert torch.equal(dead_units(model, channels), ~kept)
    masked = copy.deepcopy(model)
    report = remove_channels(model, images)
    for training in (False, True):
        torch.testing.assert_close(model.train(training)(images), masked.train(training)(images), rtol=0, atol=1e-12)
    for place in channels.weights():
        layer = model.get_submodule(place.layer)
        assert len(layer.weight) == int(place.made_by(kept).sum())
        assert len(layer.weight) == (layer.out_channels if hasattr(layer, "out_channels") else layer.out_features)
    assert report.parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert report.parameters_after < report.parameters_before == sum(p.numel() for p in masked.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_restore_is_the_inverse(name):
    model, images, _, _ = silenced(name)
    expected = model.eval()(images)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    settings = {key: str(module) for key, module in model.named_modules()}
    remove_channels(model, images)
    assert channels_removed(model)
    restore_channels(model)
    assert not channels_removed(model)
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert {key: str(module) for key, module in model.named_modules()} == settings
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)


def test_channels_that_nothing_reads():
    model, images = make("plain")
    with torch.no_grad():
        model.two.weight[:, [0, 3]] = 0
    expected = model.eval()(images)
    report = remove_channels(model, images)
    assert [shape for shape in report.shapes if shape[0] == "one.weight"] == [
        ("one.weight", (6, 3, 3, 3), (4, 3, 3, 3))
    ]
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)


def test_a_stream_loses_a_channel_only_when_all_that_make_it_are_zero():
    model, images = make("residual")
    with torch.no_grad():
        for norm in (model.b[1], model.stem[1]):
            norm.weight[0], norm.bias[0] = 0, 0
        model.b[0].weight[0] = 0
    assert remove_channels(copy.deepcopy(model), images).shapes == []
    with torch.no_grad():
        model.stem[0].weight[0] = 0
        assert remove_channels(copy.deepcopy(model), images).shapes == [], "the last block makes it, too"
        model.d[0].weight[3] = 0
        model.d[1].weight[3], model.d[1].bias[3] = 0, 0
    report = remove_channels(model, images)
    assert {name for name, _, _ in report.shapes} >= {"stem.0.weight", "b.0.weight", "d.0.weight", "a.0.weight"}


def test_constants_stay_unless_asked_for():
    model, images = make("dense")
    with torch.no_grad():
        model.a[0].weight[:2] = 0
    assert remove_channels(model, images).shapes == [], "their norms are not zero"
    report = remove_channels(model, images, constants=True)
    assert ("a.0.weight", (4, 6, 3, 3), (2, 6, 3, 3)) in report.shapes
    assert "parameters before" in str(report) and "a.0.weight" in str(report)


def test_a_dead_layer_keeps_one_channel():
    model, images = make("plain")
    with torch.no_grad():
        model.one.weight.zero_()
        model.one.bias.zero_()
    expected = model(images)
    remove_channels(model, images)
    assert len(model.one.weight) == 1
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-12)


def test_twice_is_an_error():
    model, images, _, _ = silenced("plain")
    remove_channels(model, images)
    with pytest.raises(ChannelError, match="restore_channels"):
        remove_channels(model, images)


def test_a_smaller_network_trains_and_is_exported():
    model, images, _, _ = silenced("residual")
    remove_channels(model, images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(images).square().mean().backward()
    optimizer.step()
    program = torch.export.export(model.eval(), (images,))
    torch.testing.assert_close(program.module()(images), model(images), rtol=0, atol=1e-12)


def test_pruned_filters_of_a_timm_model_and_its_folder(tmp_path):
    """Stock timm loads what is saved: zeros in the place of what was taken out."""
    model = timm.create_model("test_resnet", num_classes=4)
    images = torch.randn(2, 3, 32, 32)
    sparse_ft.prune(model, 0.5, structure="filter")
    report = sparse_ft.remove_channels(model, images, constants=True)
    assert report.parameters_after < 0.9 * report.parameters_before
    expected = model.eval()(images)
    sparse_ft.save_pretrained(model, tmp_path / "model")
    assert channels_removed(model)
    stock = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    torch.testing.assert_close(stock(images), expected, rtol=1e-4, atol=1e-5)
    again = sparse_ft.from_pretrained(tmp_path / "model", convert=False)
    assert remove_channels(again, images).parameters_after == report.parameters_after
