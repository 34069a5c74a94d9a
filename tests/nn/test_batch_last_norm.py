import copy
import pickle

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from sparse_ft.nn import LayoutNorm, LayoutNormAct, follow_layout, restore_stock, stock_type
from sparse_ft.ops import BATCH_LAST, is_batch_last

FORMS = {
    "stock": lambda: nn.BatchNorm2d(6),
    "not affine": lambda: nn.BatchNorm2d(6, affine=False),
    "cumulative average": lambda: nn.BatchNorm2d(6, momentum=None),
    "no statistics": lambda: nn.BatchNorm2d(6, track_running_stats=False),
    "wide eps": lambda: nn.BatchNorm2d(6, eps=0.1, momentum=0.5),
    "frozen": lambda: nn.BatchNorm2d(6).requires_grad_(False),
    "timm": lambda: BatchNormAct2d(6),
    "timm without activation": lambda: BatchNormAct2d(6, apply_act=False),
    "timm silu": lambda: BatchNormAct2d(6, act_layer=nn.SiLU),
    "timm hardswish": lambda: BatchNormAct2d(6, act_layer=nn.Hardswish),
    "timm gelu": lambda: BatchNormAct2d(6, act_layer=nn.GELU),
    "timm relu6": lambda: BatchNormAct2d(6, act_layer=nn.ReLU6),
    "timm mish": lambda: BatchNormAct2d(6, act_layer=nn.Mish),  # no native form
}
forms = pytest.mark.parametrize("form", FORMS)


def make(form: str) -> tuple[nn.Module, nn.Module]:
    """A norm with random parameters, and its batch-last form."""
    stock = FORMS[form]()
    for parameter in stock.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    norm = copy.deepcopy(stock)
    assert follow_layout(norm)
    return stock, norm


def batch_last(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.sparse_ft.to_layout(x.detach(), BATCH_LAST)


@forms
def test_step_by_step_as_torch(form):
    stock, norm = make(form)
    for step in range(5):
        for module in (stock, norm):
            module.train(step != 3)
        x = torch.randn(4 + step, 6, 5, 7) * 2 + 1
        one, two = x.requires_grad_(True), batch_last(x).requires_grad_(True)
        want, y = stock(one), norm(two)
        assert is_batch_last(y)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        grad = torch.randn_like(want)
        want.backward(grad)
        y.backward(grad)
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-4, atol=1e-5)
        for (name, a), (_, b) in zip(norm.named_parameters(), stock.named_parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None), name
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
            a.grad = b.grad = None
        assert list(norm.state_dict()) == list(stock.state_dict())
        for name, buffer in stock.named_buffers():
            torch.testing.assert_close(norm.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)


@forms
def test_evaluation_from_given_statistics(form):
    stock, norm = make(form)
    for module in (stock, norm):
        module.eval()
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.copy_(torch.linspace(0.5, 2, 6))
    x = torch.randn(3, 6, 4, 4)
    torch.testing.assert_close(norm(batch_last(x)), stock(x), rtol=1e-5, atol=1e-5)


@forms
def test_other_layouts_and_types_are_torchs(form):
    stock, norm = make(form)
    for x in (torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5).contiguous(memory_format=torch.channels_last)):
        assert torch.equal(norm(x), stock(x))
    stock.double(), norm.double()
    x = batch_last(torch.randn(4, 6, 5, 5, dtype=torch.float64))
    assert torch.equal(norm(x), stock(x))


def test_torchs_own_errors():
    norm = make("stock")[1]
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(torch.randn(1, 6, 1, 1))
    with pytest.raises(RuntimeError, match="running_mean should contain 5 elements"):
        norm(batch_last(torch.randn(3, 5, 4, 4)))
    with pytest.raises(ValueError, match="expected 4D input"):
        norm(torch.randn(3, 6, 4))


@forms
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(form, copied):
    _, norm = make(form)
    norm.eval()
    x = batch_last(torch.randn(3, 6, 4, 4))
    other = copied(norm)
    assert type(other) is type(norm) and torch.equal(other(x), norm(x))


@forms
def test_there_and_back(form):
    stock, norm = make(form)
    assert stock_type(norm) is type(stock) is not type(norm)
    assert not follow_layout(norm)  # it is one already
    restore_stock(norm)
    assert type(norm) is type(stock)
    restore_stock(norm)
    assert type(norm) is type(stock)


@pytest.mark.parametrize(
    "module", [nn.SyncBatchNorm(4), nn.BatchNorm1d(4), nn.BatchNorm3d(4), nn.GroupNorm(2, 4), nn.LazyBatchNorm2d()]
)
def test_other_norms_are_left_alone(module):
    kind = type(module)
    assert not follow_layout(module) and type(module) is kind
    restore_stock(module)
    assert type(module) is kind


def test_becomes_a_synchronised_norm_like_a_stock_one():
    model = nn.Sequential(make("stock")[1])
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[0]) is nn.SyncBatchNorm


def test_every_batch_norm_of_timms_networks_is_covered():
    kinds = set()
    for name in ("resnet18", "mobilenetv1_100", "efficientnet_b0"):
        for module in timm.create_model(name).modules():
            if isinstance(module, nn.BatchNorm2d):
                kinds.add(type(module))
                assert follow_layout(module)
                assert isinstance(module, LayoutNorm | LayoutNormAct)
    assert kinds == {nn.BatchNorm2d, BatchNormAct2d}
