"""A call straight to an implementation is the call through the dispatcher, and whoever watches operators sees them."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_ft.nn import SparseConv2d, SparseLinear
from sparse_ft.ops import _native


def _layers():
    torch.manual_seed(0)
    conv, linear = torch.nn.Conv2d(6, 9, 3, padding=1), torch.nn.Linear(12, 7)
    for layer in (conv, linear):
        with torch.no_grad():
            layer.weight.mul_(torch.rand_like(layer.weight) < 0.3)
    return [
        (SparseConv2d.from_dense(conv), torch.randn(4, 6, 5, 5), "conv2d"),
        (SparseLinear.from_dense(linear), torch.randn(3, 12), "linear"),
    ]


def _train(layer, x, recorder=None):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    if recorder is None:
        layer(x).square().sum().backward()
    else:
        with recorder:
            layer(x).square().sum().backward()
    return [x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class _SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "_schema", None) and func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("layer", "x", "name"), _layers(), ids=["conv", "linear"])
def test_modes_and_the_profiler_see_operators_and_change_nothing(layer, x, name):
    expected = _train(layer, x)
    dispatched, functions = _Seen(), _SeenFunctions()
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    for recorder in (dispatched, functions, profiler):
        for mine, theirs in zip(_train(layer, x, recorder), expected, strict=True):
            assert torch.equal(mine, theirs)
    weight_grad = "_weight_bias_grad" if name == "linear" else "_weight_grad"
    wanted = {f"sparse_ft::{name}{suffix}" for suffix in ("", "_input_grad", weight_grad)}
    assert wanted <= set(dispatched.names)
    assert f"sparse_ft::{name}" in functions.names
    assert wanted <= {event.key for event in profiler.key_averages()}


class _Other(torch.Tensor):
    pass


def test_it_is_seen_who_watches():
    x, answers = torch.ones(3), []

    def ask(x):
        answers.append((_native.untransformed(), _native.unwatched(x, None, 1, [x])))
        return x + 1

    ask(x)
    ask(torch.nn.Parameter(x))
    ask(x.as_subclass(_Other))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        ask(x)
    for mode in (_Seen(), _SeenFunctions()):
        with mode:
            ask(x)
    torch.func.vmap(ask)(x)
    torch.jit.trace(ask, x, check_trace=False)
    watched = (False, False)
    assert answers == [(True, True), (True, True), (True, False), (True, False), *[watched] * 4]


def test_versions_tell_writing():
    x, y = torch.ones(3), torch.ones(3)
    with torch.inference_mode():
        uncounted = torch.ones(3)
    before = _native.versions_of(x, None, y, uncounted)
    assert _native.versions_of(x, None, y, uncounted) == before
    assert _native.versions_of(x) + _native.versions_of(None, y, uncounted) == before
    y.add_(1)
    assert _native.versions_of(x, None, y, uncounted) != before


@pytest.mark.parametrize(("layer", "x", "name"), _layers(), ids=["conv", "linear"])
def test_without_gradients_nothing_is_recorded(layer, x, name):
    expected = layer(x).detach()
    with torch.no_grad():
        y = layer(x.clone().requires_grad_())
    assert not y.requires_grad and torch.equal(y, expected)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


@pytest.mark.parametrize(("layer", "x", "name"), _layers(), ids=["conv", "linear"])
def test_a_second_derivative_is_refused(layer, x, name):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
