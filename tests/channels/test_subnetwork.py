"""A model with a part of its channels computes what it computes with the others at zero: outputs and gradients."""

import contextlib
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import NETWORKS, make
from timm.models.densenet import DenseNet
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.vgg import VGG
from torch import nn

from sparse_ft.channels import SubNetwork, analyze_channels
from sparse_ft.nn import compute_varying

SMALL = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "num_classes": 10}
TIMM = {
    "ResNet": lambda: ResNet(BasicBlock, **SMALL),
    "Wide ResNet": lambda: ResNet(Bottleneck, base_width=128, **SMALL),
    "ResNeXt": lambda: ResNet(Bottleneck, cardinality=4, base_width=8, **SMALL),
    "VGG": lambda: VGG([8, "M", 16, "M", 24, "M"], num_classes=10, mlp_ratio=0.01, norm_layer=nn.BatchNorm2d),
    "DenseNet": lambda: DenseNet(growth_rate=8, block_config=(2, 2, 2), num_classes=10),
    "MobileNetV1": lambda: timm.create_model("mobilenetv1_100", num_classes=10),
    "MobileNetV3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "EfficientNet": lambda: timm.create_model("efficientnet_b0", num_classes=10),
}


def half(channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(channels.count, generator=generator) < 0.5
    return channels.with_floor(drawn, 1, torch.zeros(channels.count))


def zero_behind_norms(model, channels, kept):
    """Hooks that multiply by the mask what the last layer in front of any activation puts out: the masked network,
    written independently of how the small one is made."""
    norms = {place.layer: place for place in channels.places if place.kind == "affine" and place.key == "weight"}
    hooks = []
    for place in [*channels.weights(), *norms.values()]:
        stays = place.made_by(kept)

        def hook(module, args, output, stays=stays):
            shape = (1, -1, 1, 1) if output.dim() == 4 else (-1,)
            return output * stays.view(shape).to(output.dtype)

        hooks.append(model.get_submodule(place.layer).register_forward_hook(hook))
    return hooks


def train_once(model, images, labels, part=None):
    model.zero_grad()
    with part.active() if part else contextlib.nullcontext():
        outputs = model(images)
    loss = F.cross_entropy(outputs, labels)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_equals_the_masked_network(name, training):
    model, images = make(name)
    labels = torch.randint(0, 5, (4,))
    channels = analyze_channels(model, images)
    kept = half(channels)
    model.train(training)
    statistics = {key: value.clone() for key, value in model.named_buffers()}
    loss, gradients = train_once(model, images, labels, SubNetwork(model, channels, kept))
    updated = {key: value.clone() for key, value in model.named_buffers()}
    model.load_state_dict(statistics, strict=False)
    hooks = zero_behind_norms(model, channels, kept)
    expected, theirs = train_once(model, images, labels)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-9, atol=1e-12, msg=key)
    # Norms have seen the same in channels that are kept, and nothing in the others.
    for place in channels.places:
        if place.kind == "statistic":
            stays = place.made_by(kept)
            ours, before = updated[place.name], statistics[place.name]
            torch.testing.assert_close(ours[stays], model.get_buffer(place.name)[stays], rtol=1e-12, atol=1e-12)
            assert torch.equal(ours[~stays], before[~stays])


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_are_physically_small(name):
    model, images = make(name)
    channels = analyze_channels(model, images)
    kept = half(channels)
    seen = {}
    hooks = []
    for place in channels.weights():

        def see(module, args, output, name=place.layer):
            seen[name] = module.weight.shape, output.shape

        hooks.append(model.get_submodule(place.layer).register_forward_hook(see))
    with SubNetwork(model, channels, kept).active():
        model(images)
    for hook in hooks:
        hook.remove()
    for place in channels.weights():
        weight, output = seen[place.layer]
        assert weight[0] == int(place.made_by(kept).sum()) and weight[0] in output[1:]


@pytest.mark.parametrize("name", NETWORKS)
def test_native_kernels_give_the_same(name):
    """Outputs, gradients and statistics, and the model is the stock one again."""
    model, images = make(name)
    model, images = model.float(), images.float().repeat(4, 1, 1, 1)
    images += 0.1 * torch.randn_like(images)
    labels = torch.randint(0, 5, (16,))
    channels = analyze_channels(model, images)
    kept = half(channels)
    kinds = [type(module) for module in model.modules()]
    widths = [module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    model.train()
    statistics = {key: value.clone() for key, value in model.named_buffers()}
    expected, theirs = train_once(model, images, labels, SubNetwork(model, channels, kept))
    seen = {key: value.clone() for key, value in model.named_buffers()}
    model.load_state_dict(statistics, strict=False)
    layouts = []
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    hook = first.register_forward_hook(lambda module, args, output: layouts.append(output.stride(0)))
    found, ours = train_once(model, images, labels, SubNetwork(model, channels, kept, native=True))
    hook.remove()
    assert layouts == [1], "samples lie beside each other: the native kernels were at work"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for key, gradient in ours.items():
        scale = float(theirs[key].abs().max())
        torch.testing.assert_close(gradient, theirs[key], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=key)
    for key, value in model.named_buffers():
        torch.testing.assert_close(value, seen[key], rtol=1e-4, atol=1e-5, msg=key)
    assert [type(module) for module in model.modules()] == kinds
    assert [module.num_features for module in model.modules() if isinstance(module, nn.BatchNorm2d)] == widths


def test_wide_convolutions_compute_in_whole_blocks_of_channels():
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 70, 3, padding=1, bias=False), nn.Conv2d(70, 99, 3, 2, 1, bias=False)
    model = nn.Sequential(first, nn.BatchNorm2d(70), second, nn.Hardswish(), nn.Conv2d(99, 80, 1), nn.Flatten(2))
    images, varying = torch.randn(16, 3, 8, 8), copy.deepcopy(model)
    for module in varying:
        compute_varying(module)
    expected, found = model(images), varying(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    for (name, ours), theirs in zip(varying.named_parameters(), model.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


def test_gradients_of_what_is_left_out_are_zero():
    model, images = make("residual")
    channels = analyze_channels(model, images)
    kept = half(channels)
    _, gradients = train_once(model, images, torch.randint(0, 5, (4,)), SubNetwork(model, channels, kept))
    for place in channels.places:
        if place.kind != "statistic":
            stays = place.made_by(kept)
            assert not gradients[place.name][~stays].any()
            assert gradients[place.name][stays].any()


def test_statistics_can_be_left_alone():
    model, images = make("dense")
    channels = analyze_channels(model, images)
    before = {key: value.clone() for key, value in model.named_buffers()}
    model.train()
    with SubNetwork(model, channels, half(channels)).active(keep_statistics=False):
        model(images)
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())


def test_the_model_is_whole_again_after_an_error():
    model, images = make("grouped")
    channels = analyze_channels(model, images)
    parameters = dict(model.named_parameters())
    with pytest.raises(RuntimeError), SubNetwork(model, channels, half(channels)).active():
        model(images[:, :2])
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.depthwise[0].groups == 12


def test_bfloat16():
    model, images = make("residual")
    model, images = model.float(), images.float()
    with torch.autocast("cpu", torch.bfloat16):
        channels = analyze_channels(model, images)
    assert channels.count == analyze_channels(model, images).count > 0
    with SubNetwork(model.eval(), channels, half(channels)).active(), torch.no_grad():
        exact = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(images)
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", TIMM)
def test_timm_models(name, layout):
    torch.manual_seed(0)
    model = TIMM[name]().to(memory_format=layout)
    images = torch.randn(2, 3, 32, 32).to(memory_format=layout)
    channels = analyze_channels(model, images)
    rows = sum(len(place.rows) for place in channels.weights())
    free = sum(int((place.rows >= 0).sum()) for place in channels.weights())
    assert free == rows - 10, "all but the classes"
    model.train()
    with SubNetwork(model, channels, half(channels)).active():
        outputs = model(images)
    outputs.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
