"""Statistics that a convolution takes of its results for the norm that follows."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse_ft
from sparse_ft import ops
from sparse_ft.nn import SparseConv2d
from sparse_ft.ops.statistics import moments_of

generated = pytest.mark.skipif(
    ops.available_isas()[0] != "avx512-jit", reason="only generated code takes statistics on the way"
)

CASES = [  # in, out, kernel, stride, size, batch
    (16, 40, 3, 1, 9, 16),
    (16, 40, 3, 1, 9, 64),  # in parts of the samples
    (24, 64, 3, 2, 14, 37),
    (64, 130, 1, 1, 7, 64),
    (40, 64, 1, 2, 8, 33),
    (8, 64, 5, 1, 11, 5),
    (300, 32, 3, 1, 28, 32),  # sums wait for the next part of the channels
    (64, 64, 3, 1, 1, 64),
]


def layer(inputs, outputs, kernel, stride, bias=False):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
    with torch.no_grad():
        conv.weight.masked_fill_(torch.rand_like(conv.weight) < 0.8, 0.0)
    return SparseConv2d.from_dense(conv).train()


def check(y, moments):
    assert moments is not None
    channels = y.detach().double().transpose(0, 1).flatten(1)
    mean, variance = (tensor.double() for tensor in moments)
    deviation = channels.std(1, correction=0)
    assert ((mean - channels.mean(1)).abs() <= 1e-5 * deviation + 1e-6 * channels.mean(1).abs()).all()
    torch.testing.assert_close(variance, channels.var(1, correction=0), rtol=1e-5, atol=0)


@generated
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_are_those_of_the_results(case, dtype, threads):
    *shape, size, batch = case
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    x = torch.randn(batch, shape[0], size, size) + 3
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        y = layer(*shape)(x)
    assert y.dtype == dtype
    check(y, moments_of(y))


@generated
def test_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    conv, x = layer(64, 64, 3, 1), torch.randn(32, 64, 14, 14)
    taken = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        taken.append(moments_of(conv(x)))
    for moments in taken[1:]:
        assert all(torch.equal(a, b) for a, b in zip(moments, taken[0], strict=True))


@generated
def test_hold_far_from_zero():
    torch.manual_seed(0)
    conv, x = layer(32, 64, 1, 1), torch.randn(64, 32, 14, 14) + 1000
    y = conv(x)
    channels = y.detach().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(moments_of(y)[1].double(), channels.var(1, correction=0), rtol=1e-4, atol=1e-6)


@generated
def test_an_outlier_or_nan_is_no_surprise():
    torch.manual_seed(0)
    conv, x = layer(32, 64, 1, 1), torch.randn(64, 32, 14, 14)
    x[0, 3, 0, 0] = 1e4
    y = conv(x)
    check(y, moments_of(y))
    x[0, 3, 0, 0] = float("nan")
    y = conv(x)
    mean, variance = moments_of(y)
    nan = y.detach().transpose(0, 1).flatten(1).isnan().any(1)
    assert torch.equal(mean.isnan(), nan) and torch.equal(variance.isnan(), nan)


@generated
def test_are_forgotten_when_the_results_change():
    y = layer(16, 40, 3, 1)(torch.randn(16, 16, 9, 9)).detach()
    z = layer(16, 40, 3, 1)(torch.randn(16, 16, 9, 9))
    assert moments_of(y) is None  # another tensor
    with torch.no_grad():
        assert moments_of(z) is not None
        z.mul_(2)
    assert moments_of(z) is None


def test_are_not_taken_where_no_norm_would_ask():
    x = torch.randn(16, 16, 9, 9)
    assert moments_of(layer(16, 40, 3, 1).eval()(x)) is None
    assert moments_of(layer(16, 40, 3, 1, bias=True)(x)) is None


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, padding=1, bias=False), nn.BatchNorm2d(64),
    )  # fmt: skip
    sparse_ft.prune(model, 0.8, ignore=[])
    return model


def step(model, x, run=lambda model, x: model(x)):
    x = x.clone().requires_grad_()
    run(model, x).square().mean().backward()
    return [x.grad, *(p.grad for p in model.parameters())]


def test_norms_follow_dense_ones():
    dense, x = network(), torch.randn(32, 16, 12, 12)
    sparse = copy.deepcopy(dense)
    sparse_ft.convert(sparse, policy="always")
    expected, got = step(dense.double(), x.double()), step(sparse, x)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-4, atol=1e-7)
    for i in (1, 4):
        for name, exact in dense[i].named_buffers():
            torch.testing.assert_close(sparse[i].get_buffer(name).double(), exact.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_changes_nothing(reentrant):
    sparse = network()
    sparse_ft.convert(sparse, policy="always")
    other, x = copy.deepcopy(sparse), torch.randn(32, 16, 12, 12)

    def run(model, x):
        return checkpoint(model, x, use_reentrant=reentrant)

    for a, b in zip(step(sparse, x), step(other, x, run), strict=True):
        assert torch.equal(a, b)


@generated
def test_a_norm_reads_its_input_once(monkeypatch):
    from sparse_ft.nn import norm

    def never(x):
        raise AssertionError("the statistics were taken already")

    monkeypatch.setattr(norm, "batch_norm_statistics", never)
    sparse = network()
    sparse_ft.convert(sparse, policy="always")
    step(sparse, torch.randn(32, 16, 12, 12))
