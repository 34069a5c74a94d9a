import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, ROUNDING, as_stored, expected

from sparse_ft.ops import Activation, is_batch_last

EPS = 1e-5


def _run(x, weight, bias, statistics, grad):
    leaves = [None if t is None else t.detach().requires_grad_(True) for t in (x, weight, bias)]
    y, mean, rstd, variance = torch.ops.sparse_ft.batch_norm(*leaves, *(statistics or (None, None)), EPS)
    assert is_batch_last(y)
    y.backward(grad)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)], (mean, rstd, variance)


def _check(x, weight, bias, statistics, grad, storages=("contiguous", "contiguous"), *, rtol=1e-5):
    got, (mean, rstd, variance) = _run(
        as_stored(x, storages[0]), weight, bias, statistics, as_stored(grad, storages[1])
    )
    training = statistics is None
    given_statistics = (None, None) if training else tuple(s.double() for s in statistics)

    def norm(x, weight, bias):
        return F.batch_norm(x, *given_statistics, weight, bias, training, 0.0, EPS)

    want = expected(norm, grad, x, weight, bias)
    wide = x.double()
    for a, b in zip(got, want, strict=True):
        # Rounding is relative to what is summed, which is larger than the sum by up to the square root of the count.
        scale = max(1.0, float(b.abs().max()) if b.numel() else 1.0) * (1 if a.dim() == 4 else x[:, 0].numel() ** 0.5)
        assert a.shape == b.shape and a.dtype == (x.dtype if a.dim() == 4 else torch.float32)
        near = rtol + ROUNDING[a.dtype]
        torch.testing.assert_close(a.double(), b, rtol=near, atol=near * scale)
    if training:
        statistics = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), statistics[0].double(), rtol=1e-6, atol=1e-6 * (1 + x.abs().max()))
    torch.testing.assert_close(variance.double(), statistics[1].double(), rtol=rtol, atol=rtol)
    torch.testing.assert_close(rstd.double(), (statistics[1].double() + EPS).rsqrt(), rtol=rtol, atol=rtol)


STORAGES = st.sampled_from(["contiguous", "channels_last", "batch_last", "strided"])


@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9)).filter(
        lambda s: s[0] * s[2] * s[3] > 1
    ),
    training=st.booleans(),
    affine=st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
    storages=st.tuples(STORAGES, STORAGES),
    threads=st.sampled_from([1, 1, 2, 3]),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60)
def test_against_float64(isa, shape, training, affine, storages, threads, seed, dtype):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    weight, bias = (torch.randn(channels, generator=generator) if has else None for has in affine)
    statistics = None
    if not training:
        statistics = torch.randn(channels, generator=generator), torch.rand(channels, generator=generator) + 0.1
    # Every channel varies: a constant one divides rounding by the square root of eps, in torch as here.
    x = torch.randn(shape, generator=generator) * 2 + 1
    x[0, :, 0, 0] += 3
    grad = torch.randn(shape, generator=generator)
    _check(x.to(dtype), weight, bias, statistics, grad.to(dtype), storages, rtol=1e-4)


@pytest.mark.parametrize("shape", [(32, 48, 28, 28), (33, 40, 29, 31)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_that_bypass_the_caches(isa, shape, training, dtype):
    shape = shape if dtype == torch.float32 else (shape[0], 2 * shape[1], *shape[2:])  # as many bytes
    generator = torch.Generator().manual_seed(1)
    torch.set_num_threads(2)
    weight, bias, mean = (torch.randn(shape[1], generator=generator) for _ in range(3))
    statistics = None if training else (mean, weight.abs() + 0.1)
    x, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    _check(x, weight, bias, statistics, grad, ("batch_last", "batch_last"), rtol=1e-4)


@pytest.mark.parametrize("mean", [0.0, 100.0, -5000.0])
def test_small_variance_around_a_large_mean(isa, mean):
    generator = torch.Generator().manual_seed(0)
    x = mean + torch.randn(64, 3, 28, 28, generator=generator)
    weight, bias = torch.randn(3, generator=generator), torch.randn(3, generator=generator)
    _check(x, weight, bias, None, torch.randn(x.shape, generator=generator), rtol=3e-4 if abs(mean) > 1000 else 1e-5)


def test_outliers_at_the_beginning_of_a_channel(isa):
    """The first element, far from the others, must not become the point around which the variance is summed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 2, 28, 28, generator=generator)
    x[0, :, 0, 0] = 300.0
    _, (mean, rstd, variance) = _run(x, None, None, None, torch.ones_like(x))
    want = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(variance.double(), want, rtol=1e-5, atol=0)


def test_constant_channel(isa):
    x = torch.full((8, 2, 4, 4), 3.25)
    (y, grad_x), (mean, rstd, variance) = _run(x, None, None, None, torch.ones_like(x))
    assert torch.equal(y, torch.zeros_like(y)) and torch.equal(variance, torch.zeros(2))
    assert torch.equal(mean, torch.full((2,), 3.25))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_stay_in_their_channel(isa, training, value):
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[2, 1, 3, 0] = value
    statistics = None if training else (torch.zeros(3), torch.ones(3))
    got, _ = _run(x, torch.ones(3), torch.zeros(3), statistics, torch.ones_like(x))

    def norm(x, weight, bias):
        return F.batch_norm(x, *(statistics or (None, None)), weight, bias, training, 0.0, EPS)

    leaves = [t.requires_grad_(True) for t in (x, torch.ones(3), torch.zeros(3))]
    y = norm(*leaves)
    y.backward(torch.ones_like(x))
    for a, b in zip(got, [y.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (4, 0, 4, 4), (4, 3, 0, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(shape, dtype):
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    channels = shape[1]
    y, *_ = torch.ops.sparse_ft.batch_norm(x, None, None, torch.zeros(channels), torch.ones(channels), EPS)
    y.sum().backward()
    assert y.shape == shape and x.grad.shape == shape


KINKS = {Activation.RELU: (0,), Activation.RELU6: (0, 6), Activation.HARDSWISH: (-3, 3)}
FUNCTIONS = {
    Activation.IDENTITY: lambda v: v,
    Activation.RELU: F.relu,
    Activation.RELU6: F.relu6,
    Activation.SILU: F.silu,
    Activation.HARDSWISH: F.hardswish,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda v: F.gelu(v, approximate="tanh"),
}


@pytest.mark.parametrize("activation", Activation)
@given(
    shape=st.tuples(st.integers(2, 70), st.integers(1, 12), st.integers(1, 9), st.integers(1, 9)),
    training=st.booleans(),
    affine=st.booleans(),
    residual=st.sampled_from([None, "batch_last", "contiguous"]),
    storages=st.tuples(STORAGES, STORAGES),
    threads=st.sampled_from([1, 1, 2]),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=40)
def test_what_follows_the_norm(isa, activation, shape, training, affine, residual, storages, threads, seed, dtype):
    """With residual and activation, forward and backward, against torch in float64."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    x, r, grad = (torch.randn(shape, generator=generator) * 2 + 1 for _ in range(3))
    x[0, :, 0, 0] += 3  # every channel varies
    x, r, grad = (t.to(dtype) for t in (x, r, grad))
    weight, bias = (torch.randn(shape[1], generator=generator) if affine else None for _ in range(2))
    given_statistics = (None, None)
    if not training:
        given_statistics = torch.randn(shape[1], generator=generator), torch.rand(shape[1], generator=generator) + 0.1
    wide_statistics = tuple(None if s is None else s.double() for s in given_statistics)

    def before_activation(x, r, weight, bias):
        v = F.batch_norm(x, *wide_statistics, weight, bias, training, 0.0, EPS)
        return v if residual is None else v + r

    v = before_activation(*(None if t is None else t.double() for t in (x, r, weight, bias)))
    for kink in KINKS.get(activation, ()):  # rounding may fall on either side of it
        grad[(v - kink).abs() < 1e-4 + abs(kink) * ROUNDING[dtype]] = 0

    def whole(x, *others):
        r, weight, bias = others if residual is not None else (None, *others)
        return FUNCTIONS[activation](before_activation(x, r, weight, bias))

    operands = [x, r, weight, bias] if residual is not None else [x, weight, bias]
    want = expected(whole, grad, *operands)

    leaves = [as_stored(x, storages[0]), None if residual is None else as_stored(r, residual), weight, bias]
    leaves = [None if t is None else t.detach().requires_grad_(True) for t in leaves]
    x, r, weight, bias = leaves
    y, *_ = torch.ops.sparse_ft.batch_norm(x, weight, bias, *given_statistics, EPS, r, activation)
    assert is_batch_last(y)
    y.backward(as_stored(grad, storages[1]))
    got = [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]
    for a, b in zip(got, want, strict=True):
        scale = max(1.0, float(b.abs().max())) * (1 if a.dim() == 4 else x[:, 0].numel() ** 0.5)
        near = 1e-4 + 2 * ROUNDING[a.dtype]  # a gradient may wait in its own type for the channel's sums
        torch.testing.assert_close(a.double(), b, rtol=near, atol=near * scale)


@pytest.mark.parametrize("activation", Activation)
def test_activations_at_every_size(isa, activation):
    """From the smallest numbers to the largest, and at the kinks: values and slopes are torch's."""
    sizes = torch.cat([torch.logspace(-40, 38, 400), torch.tensor([0.0, 3.0, 6.0, 88.0, 89.0, 104.0, 1e10])])
    v = torch.cat([-sizes, sizes, torch.linspace(-110, 110, 4001)])
    x = v.view(-1, 1, 1, 1).requires_grad_(True)
    grad = torch.ones_like(x)
    # Mean 0 and variance 1: the pre-activation is x.
    y, *_ = torch.ops.sparse_ft.batch_norm(x, None, None, torch.zeros(1), torch.ones(1), 0.0, None, activation)
    (slope,) = torch.autograd.grad(y, x, grad)
    wide = x.detach().double().requires_grad_(True)
    want = FUNCTIONS[activation](wide)
    (want_slope,) = torch.autograd.grad(want, wide, grad.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=3e-7)
    torch.testing.assert_close(slope.double(), want_slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_goes_through_an_activation(isa, activation, residual, dtype):
    x = torch.randn(5, 3, 4, 4).to(dtype)
    x[2, 1, 3, 0] = torch.nan
    statistics = torch.zeros(3), torch.ones(3)
    r = torch.zeros_like(x) if residual else None
    y, *_ = torch.ops.sparse_ft.batch_norm(x, None, None, *statistics, EPS, r, activation)
    assert torch.equal(y.isnan(), x.isnan())


@pytest.mark.parametrize("activation", [-1, 7])
def test_unknown_activation(activation):
    x = torch.randn(5, 3, 4, 4)
    with pytest.raises(ValueError, match="activation must be one of"):
        torch.ops.sparse_ft.batch_norm(x, None, None, None, None, EPS, None, activation)


def test_a_residual_of_another_shape():
    with pytest.raises(ValueError, match="the residual must have shape"):
        torch.ops.sparse_ft.batch_norm(torch.randn(5, 3, 4, 4), None, None, None, None, EPS, torch.randn(5, 3, 1, 1))


def test_same_result_twice(isa):
    x, grad = torch.randn(33, 5, 7, 7), torch.randn(33, 5, 7, 7)
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        one, _ = _run(x, torch.ones(5), torch.zeros(5), None, grad)
        other, _ = _run(x, torch.ones(5), torch.zeros(5), None, grad)
        assert all(map(torch.equal, one, other))
