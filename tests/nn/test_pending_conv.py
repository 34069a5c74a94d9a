"""In evaluation without gradients a convolution's output waits for its norm: the same numbers, whatever follows."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from pruned import zeroed
from torch import nn

import sparse_ft
from sparse_ft.nn import SparseConv2d
from sparse_ft.nn.deferred import Deferred
from sparse_ft.nn.pending_conv import PendingConv
from sparse_ft.ops import BATCH_LAST
from sparse_ft.ops.gradients import to_layout

BatchNormAct2d = timm.layers.BatchNormAct2d


class Net(nn.Module):
    """A convolution, its norm, and what an expression makes of them; `s` is of the norm's shape."""

    def __init__(self, expression, norm):
        super().__init__()
        self.conv, self.norm, self.expression = zeroed(nn.Conv2d(6, 8, 3, padding=1)), norm, expression

    def forward(self, x, s):
        return self.expression(self, x, s)


def norm(kind=nn.BatchNorm2d, **options):
    found = kind(8, **options)
    with torch.no_grad():
        for tensor in (found.weight, found.bias, found.running_mean):
            if tensor is not None:
                tensor.normal_()
        found.running_var.uniform_(0.5, 2)
    return found


NORMS = {
    "torch": norm,
    "without weights": lambda: norm(affine=False),
    "timm": lambda: norm(BatchNormAct2d),
    "timm, silu": lambda: norm(BatchNormAct2d, act_layer=nn.SiLU),
    "timm, no activation": lambda: norm(BatchNormAct2d, apply_act=False),
    "timm, unknown activation": lambda: norm(BatchNormAct2d, act_layer=nn.Tanh),
}


def plain(net, x, s):
    return net.norm(net.conv(x))


def residual_in_place(net, x, s):
    y = net.norm(net.conv(x))
    y += s
    return F.relu(y, inplace=True)


def two_readers(net, x, s):
    y = net.conv(x)
    return net.norm(y) + y


def held(net, x, s):
    y = net.conv(x)
    z = net.norm(y)
    w = F.relu(z)
    return torch.cat([y, z, w])


def changed_after(net, x, s):
    y = net.norm(net.conv(x))
    z = F.relu(y)
    y.mul_(2)
    return z + y


def both_deferred(net, x, s):
    return F.relu(net.norm(net.conv(x)) + net.norm(net.conv(x * 2)))


EXPRESSIONS = {
    "norm": plain,
    "relu": lambda net, x, s: F.relu(net.norm(net.conv(x))),
    "silu": lambda net, x, s: F.silu(net.norm(net.conv(x))),
    "hardswish": lambda net, x, s: F.hardswish(net.norm(net.conv(x))),
    "residual": lambda net, x, s: F.relu(net.norm(net.conv(x)) + s),
    "residual first": lambda net, x, s: (s + net.norm(net.conv(x))).relu(),
    "residual in place": residual_in_place,
    "two readers": two_readers,
    "held": held,
    "changed after": changed_after,
    "both deferred": both_deferred,
    "no norm": lambda net, x, s: net.conv(x).mean((2, 3)),
    "relu without a norm": lambda net, x, s: F.relu(net.conv(x)),
    "residual without a norm": lambda net, x, s: net.conv(x) + s,
    "added, then normalised": lambda net, x, s: net.norm(net.conv(x) + s),
    "activated, then normalised": lambda net, x, s: net.norm(net.conv(x).relu()),
    "broadcast": lambda net, x, s: net.norm(net.conv(x)) + s[:, :1],
    "twice": lambda net, x, s: net.norm(net.norm(net.conv(x))),
    "view": lambda net, x, s: net.norm(net.conv(x)).flatten(1),
    "chunked": lambda net, x, s: torch.cat(net.norm(net.conv(x)).chunk(2, 1)[::-1], 1),
    "numpy": lambda net, x, s: torch.from_numpy(net.norm(net.conv(x)).numpy().copy()),
    "out": lambda net, x, s: torch.add(net.norm(net.conv(x)), s, out=torch.empty(0)),
}


def nets(expression, norm):
    net = Net(expression, norm).eval()
    dense = copy.deepcopy(net)
    sparse_ft.convert(net, policy="always", min_sparsity=0.1)
    assert isinstance(net.conv, SparseConv2d)
    return net, dense


@pytest.fixture
def fused(monkeypatch):
    """What was computed with a convolution: (a norm, a residual, the activation)."""
    calls, compute = [], PendingConv.compute

    def counted(self):
        calls.append((self.norm[2] is not None, self.residual is not None, int(self.activation)))
        return compute(self)

    monkeypatch.setattr(PendingConv, "compute", counted)
    return calls


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("name", EXPRESSIONS)
def test_whatever_follows(name, kind, mode):
    net, dense = nets(EXPRESSIONS[name], NORMS[kind]())
    with mode():
        for size in (1, 5, 16):  # what is learned from one pass counts in the next
            x, s = torch.randn(size, 6, 9, 7), torch.randn(size, 8, 9, 7)
            want = dense(x.clone(), s.clone())
            torch.testing.assert_close(net(x.clone(), s.clone()) * 1, want, rtol=1e-4, atol=1e-5)
            got = net(to_layout(x, BATCH_LAST), to_layout(s, BATCH_LAST))
            torch.testing.assert_close(got * 1, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "want"),
    [
        ("norm", "torch", (True, False, 0)),
        ("relu", "torch", (True, False, 1)),
        ("silu", "without weights", (True, False, 3)),
        ("residual", "torch", (True, True, 1)),
        ("residual first", "torch", (True, True, 1)),
        ("residual in place", "torch", (True, True, 1)),
        ("norm", "timm", (True, False, 1)),
        ("norm", "timm, silu", (True, False, 3)),
        ("residual", "timm, no activation", (True, True, 1)),
        ("norm", "timm, unknown activation", (True, False, 0)),
        ("relu without a norm", "torch", (False, False, 1)),
    ],
)
def test_computed_at_once(fused, name, kind, want):
    net = nets(EXPRESSIONS[name], NORMS[kind]())[0]
    x, s = torch.randn(4, 6, 9, 7), torch.randn(4, 8, 9, 7)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            net(x, s) * 1
    assert fused == [want, want]


def test_not_with_gradients_or_in_training(fused):
    net = nets(EXPRESSIONS["relu"], norm())[0]
    net(torch.randn(4, 6, 9, 7), None)
    with torch.no_grad():
        net.train()(torch.randn(4, 6, 9, 7), None)
    assert not fused


def test_what_nobody_joins_is_computed_at_once_from_then_on():
    net = nets(EXPRESSIONS["no norm"], norm())[0]
    x = torch.randn(4, 6, 9, 7)
    with torch.no_grad():
        y = net.conv(x)
        assert type(y) is Deferred
        y.mean()
        assert type(net.conv(x)) is torch.Tensor


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("what", ["input", "weight", "statistics", "norm's weight", "residual"])
def test_operands_that_change_are_an_error(what, mode):
    net = nets(EXPRESSIONS["norm"], norm())[0]
    with mode():
        x = torch.randn(4, 6, 9, 7)
        first = to_layout(x, BATCH_LAST)  # as a layer before gives it: it counts its versions in every mode
        s = to_layout(torch.randn(4, 8, 9, 7), BATCH_LAST)
        y = net.norm(net.conv(first)) + s
        assert type(y) is Deferred
        changed = {
            "input": first, "weight": net.conv.weight, "statistics": net.norm.running_mean,
            "norm's weight": net.norm.weight, "residual": s,
        }[what]  # fmt: skip
        changed.mul_(2)
        with pytest.raises(RuntimeError, match="modified in place before the result was used"):
            F.relu(y)


def test_an_input_without_versions_is_not_waited_on():
    """Whether it changes cannot be seen."""
    net, dense = nets(EXPRESSIONS["norm"], norm())
    with torch.inference_mode():
        x = to_layout(torch.randn(4, 6, 9, 7), BATCH_LAST).mul(1)
        assert x.is_inference()
        want = dense(x.clone(), None)
        y = net.conv(x)
        x.zero_()
        torch.testing.assert_close(net.norm(y) * 1, want, rtol=1e-4, atol=1e-5)


def test_modes_change_in_between():
    net, dense = nets(EXPRESSIONS["norm"], norm())
    x = torch.randn(4, 6, 9, 7)
    for made, used in ((torch.no_grad, torch.enable_grad), (torch.no_grad, torch.inference_mode)):
        with made():
            y, want = net.conv(x), dense.conv(x)
        with used():
            z, want = net.norm(y), dense.norm(want)
            torch.testing.assert_close(F.relu(z) * 1, F.relu(want), rtol=1e-4, atol=1e-5)
            assert (z * 1).requires_grad == want.requires_grad


def test_hooks_see_plain_numbers():
    net, dense = nets(EXPRESSIONS["relu"], norm())
    seen = {}
    for name, module in (("sparse", net.conv), ("dense", dense.conv)):
        module.register_forward_hook(lambda m, a, y, name=name: seen.update({name: y.sum()}))
    x = torch.randn(4, 6, 9, 7)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(net(x, None), dense(x, None), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(seen["sparse"], seen["dense"], rtol=1e-4, atol=1e-3)


def test_pickled_and_copied(tmp_path):
    net, dense = nets(EXPRESSIONS["relu"], norm())
    x = torch.randn(4, 6, 9, 7)
    with torch.no_grad():
        y = net.conv(x)
        torch.save(y, tmp_path / "y")
        torch.testing.assert_close(torch.load(tmp_path / "y"), dense.conv(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(net.conv(x)), dense.conv(x), rtol=1e-4, atol=1e-5)


def test_profiled(fused):
    """By way of the dispatcher, where others may watch."""
    net, dense = nets(EXPRESSIONS["relu"], norm())
    x = torch.randn(4, 6, 9, 7)
    with torch.no_grad(), torch.profiler.profile() as profile:
        got = net(x, None)
    torch.testing.assert_close(got, dense(x, None).detach(), rtol=1e-4, atol=1e-5)
    assert len(fused) == 1
    assert any("sparse_ft::conv2d_norm" in event.key for event in profile.key_averages())
