"""Squeeze-and-excitation beside sparse convolutions: the stock module's numbers, in batch-last layout."""

import copy

import pytest
import timm
import torch
from timm.layers import EffectiveSEModule, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn

import sparse_ft
from sparse_ft.nn import LayoutSqueeze, follow_layout, restore_stock
from sparse_ft.ops import BATCH_LAST, is_batch_last
from sparse_ft.ops.gradients import gate, image_sum, to_layout

MODULES = {
    "SqueezeExcite": lambda: SqueezeExcite(12),
    "SqueezeExcite, hard": lambda: SqueezeExcite(12, act_layer=nn.Hardswish, gate_layer=nn.Hardsigmoid),
    "SEModule": lambda: SEModule(12, rd_channels=4),
    "SEModule with maximum": lambda: SEModule(12, rd_channels=4, add_maxpool=True, norm_layer=nn.BatchNorm2d),
    "EffectiveSEModule": lambda: EffectiveSEModule(12),
}


def results(module, x, grad):
    x = x.requires_grad_(True)
    module.zero_grad()
    y = module(x)
    y.backward(grad)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("shape", [(16, 12, 9, 7), (5, 12, 1, 1), (33, 12, 14, 14), (2, 12, 5, 5)])
@pytest.mark.parametrize("name", MODULES)
def test_against_float64(name, shape):
    module = MODULES[name]().eval()
    wide = copy.deepcopy(module).double()
    assert follow_layout(module) and isinstance(module, LayoutSqueeze)
    x, grad = torch.randn(shape) + 1, torch.randn(shape)
    want = results(wide, x.double(), grad.double())
    got = results(module, to_layout(x, BATCH_LAST), to_layout(grad, BATCH_LAST))
    again = results(module, x.clone(), grad)  # in another layout: torch's own
    for a, b, right in zip(got, again, want, strict=True):
        torch.testing.assert_close(a.double(), right, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(b.double(), right, rtol=1e-4, atol=1e-4)
    assert is_batch_last(got[0]) and is_batch_last(got[1])
    restore_stock(module)
    assert type(module) is type(wide)


def test_sums_over_large_images():
    """As exact as torch's own: an image's sum is not one long chain of additions."""
    x = torch.rand(4, 3, 200, 200)
    want = x.double().sum((2, 3), keepdim=True)
    got = image_sum(to_layout(x, BATCH_LAST))
    assert ((got - want).abs() / want).max() < 2e-6


def test_gradients():
    x = to_layout(torch.randn(5, 3, 4, 6).double(), BATCH_LAST).requires_grad_(True)
    weights = torch.rand(5, 3, 1, 1).double().requires_grad_(True)
    assert torch.autograd.gradcheck(gate, (x, weights))
    assert torch.autograd.gradcheck(image_sum, (x,))


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenetv3_small_050", "regnety_002"])
def test_convert_adapts_them(name):
    model = timm.create_model(name, num_classes=10)
    sparse_ft.prune(model, 0.8)
    keys, stock = list(model.state_dict()), [type(m) for m in model.modules()]
    sparse_ft.convert(model, policy="always")
    assert any(isinstance(module, LayoutSqueeze) for module in model.modules())
    assert list(model.state_dict()) == keys
    sparse_ft.to_dense(model)
    assert [type(m) for m in model.modules()] == stock
