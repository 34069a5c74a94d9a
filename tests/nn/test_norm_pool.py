"""Max pooling that takes the activated norm before it unfinished trains as the dense model does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_unfinished_norm import ACTIVATIONS, check_to_the_last_bit, train
from torch import nn

import sparse_ft
from sparse_ft.nn import pooling


class Stem(nn.Module):
    """conv, norm, activation, pooling, conv, norm, as ResNets begin; `seen` is what else reads the activation."""

    def __init__(self, activation=F.relu, seen=None):
        super().__init__()
        self.first, self.norm = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.second, self.last = nn.Conv2d(8, 10, 1, bias=False), nn.BatchNorm2d(10)
        self.activation, self.seen = activation, seen
        for layer in (self.first, self.second):
            with torch.no_grad():
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.5)

    def forward(self, x):
        x = self.activation(self.norm(self.first(x)))
        y = self.last(self.second(self.pool(x)))
        return y if self.seen is None else y + self.seen(x)


class TwoDepthwise(nn.Module):
    """The second depthwise convolution reads a norm that went back with the first."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.deep = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.pool, self.second = nn.MaxPool2d(2), nn.Conv2d(8, 10, 1, bias=False)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        for conv, norm in zip(self.deep, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.second(self.pool(x))


@pytest.fixture
def taken(monkeypatch):
    """Counts the norms that pooling took."""
    counts = [0]
    compute = pooling.norm_max_pool2d

    def counted(*args):
        counts[0] += 1
        return compute(*args)

    monkeypatch.setattr(pooling, "norm_max_pool2d", counted)
    return counts


def compare(dense, steps=4):
    sparse = copy.deepcopy(dense)
    sparse_ft.convert(sparse, policy="always", min_sparsity=0.0)
    wide = copy.deepcopy(dense).double()
    frozen = sparse_ft.nn.freeze_masks(wide)
    want = train(wide, steps)
    frozen.remove()
    assert train(sparse, steps) == pytest.approx(want, rel=1e-4)
    for name, right in wide.named_buffers():
        torch.testing.assert_close(sparse.get_buffer(name).to(right.dtype), right, rtol=1e-4, atol=1e-5)
    return sparse


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_trains_as_the_dense_model(taken, name):
    compare(Stem(ACTIVATIONS[name]))
    assert taken == [3]  # the first step sees who reads what


@pytest.mark.parametrize("seen", [lambda x: x.mean(), lambda x: F.avg_pool2d(x, 2).sum() * 1e-3])
def test_another_reader_of_the_activation(taken, seen):
    compare(Stem(seen=seen), steps=5)
    assert taken == [0]


def test_evaluation_with_gradients(taken):
    """The statistics are given then."""
    model = Stem()
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.eval()
    compare(model)
    assert taken == [3]


def test_a_frozen_stem(taken):
    model = Stem()
    for parameter in (*model.first.parameters(), *model.norm.parameters()):
        parameter.requires_grad_(False)
    compare(model)


def test_a_norm_that_goes_back_with_a_depthwise_convolution():
    model = TwoDepthwise()
    sparse = copy.deepcopy(model)
    layers = ["first", "deep.0", "deep.1", "second"]
    sparse_ft.convert(sparse, layers=layers, min_sparsity=0.0)
    want = train(copy.deepcopy(model).double(), 5)
    assert train(sparse, 5) == pytest.approx(want, rel=1e-4)


def test_to_the_last_bit():
    model = Stem()
    sparse_ft.convert(model, policy="always", min_sparsity=0.0)
    check_to_the_last_bit(model, (32, 6, 12, 12))
