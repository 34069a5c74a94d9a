"""A depthwise convolution that computes with the norms on both sides of it trains as the dense model does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_unfinished_norm import ACTIVATIONS, check_to_the_last_bit, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse_ft
from sparse_ft.nn import pending_depthwise


class Separable(nn.Module):
    """conv, norm, activation, depthwise conv, norm, activation, conv, norm, as MobileNets have them; `inside` is what
    the model's code does with the depthwise convolution's output, `after` with the activation after it."""

    def __init__(self, activation=F.relu, stride=1, inside=lambda x: x, after=lambda x: x, bias=False):
        super().__init__()
        self.first, self.norm = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, stride, padding=1, groups=8, bias=bias)
        self.between = nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 10, 1, bias=False), nn.BatchNorm2d(10)
        self.activation, self.inside, self.after = activation, inside, after
        for layer in (self.first, self.second):
            with torch.no_grad():
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.5)

    def activated(self, x):
        x = self.inside(self.depthwise(self.activation(self.norm(self.first(x)))))
        return self.after(self.activation(self.between(x)))

    def forward(self, x):
        return self.last(self.second(self.activated(x)))


class Branches(Separable):
    """Another reader of the first activation."""

    def forward(self, x):
        y = self.activation(self.norm(self.first(x)))
        return self.last(self.second(self.activation(self.between(self.depthwise(y))) + y))


class Checkpointed(Separable):
    def forward(self, x):
        x = x.clone().requires_grad_()
        return self.last(checkpoint(lambda x: self.second(self.activated(x)), x, use_reentrant=self.reentrant))


def convert(model):
    """All of its convolutions, the depthwise one too, which has no zeros."""
    sparse_ft.convert(model, layers=["first", "depthwise", "second"], min_sparsity=0.0)


@pytest.fixture
def joined(monkeypatch):
    """Counts norms that computed a waiting depthwise convolution, and gradients of all three together."""
    counts = {"forward": 0, "backward": 0}

    def counting(name, key):
        compute = getattr(pending_depthwise, name)

        def counted(*args):
            counts[key] += 1
            return compute(*args)

        monkeypatch.setattr(pending_depthwise, name, counted)

    counting("norm_depthwise", "forward")
    counting("norm_depthwise_backward", "backward")
    return counts


def compare(dense, steps=4):
    """Train `dense` in float64 with its mask, and a converted copy."""
    sparse = copy.deepcopy(dense)
    convert(sparse)
    assert isinstance(sparse.depthwise, sparse_ft.nn.SparseConv2d)
    wide = copy.deepcopy(dense).double()
    frozen = sparse_ft.nn.freeze_masks(wide)
    want = train(wide, steps)
    frozen.remove()
    assert train(sparse, steps) == pytest.approx(want, rel=1e-4)
    for name, right in wide.named_buffers():
        torch.testing.assert_close(sparse.get_buffer(name).to(right.dtype), right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_trains_as_the_dense_model(joined, name, stride):
    compare(Separable(ACTIVATIONS[name], stride))
    assert joined == {"forward": 3, "backward": 3}  # the first step sees who reads what


def test_costly_activations_are_computed_by_themselves(joined):
    compare(Separable(F.silu))
    assert not any(joined.values())


def test_a_bias_is_not_waited_for(joined):
    compare(Separable(bias=True))
    assert not any(joined.values())


@pytest.mark.parametrize("inside", [lambda x: x * 2, F.relu, lambda x: x + 1, lambda x: F.max_pool2d(x, 3, 1, 1)])
def test_no_norm_follows(joined, inside):
    """The convolution waits in vain, once."""
    model = Separable(inside=inside)
    compare(model)
    assert not any(joined.values())
    convert(model)
    train(model, steps=2)
    assert model.depthwise._norm_follows.lost


@pytest.mark.parametrize("after", [lambda x: x * 2, lambda x: x.mean((2, 3), keepdim=True) + x, lambda x: x.clone()])
def test_others_want_the_second_activation(joined, after):
    compare(Separable(after=after))
    assert joined == {"forward": 3, "backward": 3}  # the first step sees who reads what


def test_another_reader_of_the_first_activation(joined):
    compare(Branches(), steps=5)
    assert not any(joined.values())


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_a_checkpoint(reentrant):
    model = Checkpointed()
    model.reentrant = reentrant
    compare(model)


def test_a_norm_with_given_statistics(joined):
    """In training its gradient does not go through what it measured."""
    model = Separable()
    model.between.eval()
    sparse = copy.deepcopy(model)
    convert(sparse)
    wide = copy.deepcopy(model).double()
    sparse_ft.nn.freeze_masks(wide)
    want = train(wide)
    assert train(sparse) == pytest.approx(want, rel=1e-4)
    assert not any(joined.values())


@pytest.mark.parametrize(
    "frozen", [("first",), ("norm",), ("depthwise",), ("between",), ("first", "norm", "depthwise")]
)
def test_frozen_parts(joined, frozen):
    model = Separable()
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    compare(model)


def test_without_affine_parameters(joined):
    model = Separable()
    model.norm, model.between = nn.BatchNorm2d(8, affine=False), nn.BatchNorm2d(8, affine=False)
    compare(model)
    assert joined == {"forward": 3, "backward": 3}  # the first step sees who reads what


def test_hooks_see_what_they_would(joined):
    seen = {}

    def keep(name):
        def hook(module, grad_input, grad_output):
            seen.setdefault(name, []).append(grad_output[0].clone())

        return hook

    torch.manual_seed(0)
    dense = Separable()
    sparse = copy.deepcopy(dense)
    convert(sparse)
    x = torch.randn(16, 6, 7, 9)
    for model in (dense, sparse):
        for name in ("norm", "depthwise", "between"):
            getattr(model, name).register_full_backward_hook(keep(name))
        for _ in range(2):
            model(x).square().mean().backward()
    for name, (*want, first, second) in seen.items():
        for got, right in zip((first, second), want, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-5, msg=name)
    assert len(seen) == 3


@pytest.mark.parametrize("kind", [Separable, Branches])
@pytest.mark.parametrize("size", [(16, 6, 7, 9), (32, 6, 12, 12)])
def test_to_the_last_bit(kind, size):
    model = kind(F.relu)
    convert(model)
    check_to_the_last_bit(model, size)


def test_bfloat16(joined):
    torch.manual_seed(0)
    model = Separable()
    sparse = copy.deepcopy(model)
    convert(sparse)
    x = torch.randn(32, 6, 12, 12)
    for network in (model, sparse):
        for _ in range(2):
            network.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                network(x).float().square().mean().backward()
    assert joined == {"forward": 1, "backward": 1}
    for (name, want), got in zip(model.named_parameters(), sparse.parameters(), strict=True):
        layer = sparse.get_submodule(name.rpartition(".")[0])
        grad = layer.pattern.to_dense(got.grad) if hasattr(layer, "pattern") and "weight" in name else got.grad
        right = want.grad * (want != 0) if want.dim() > 1 else want.grad
        assert (grad - right).norm() <= 0.1 * right.norm() + 1e-3, name


def test_what_it_was_computed_from_may_not_change():
    model = Separable()
    convert(model)
    train(model, steps=1)
    y = model.depthwise(model.activation(model.norm(model.first(torch.randn(16, 6, 7, 9)))))
    with torch.no_grad():
        model.depthwise.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified in place before the result was used"):
        model.between(y)
