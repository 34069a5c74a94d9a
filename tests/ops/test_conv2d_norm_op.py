"""A convolution with what follows it in evaluation (a norm, a residual, an activation), stored once."""

import pytest
import torch
from oracle import as_stored, dense_conv2d, pattern_of, sparse_weight

from sparse_ft.ops import Activation, activations
from sparse_ft.ops.gradients import batch_norm, conv2d, conv2d_norm

CASES = {
    "1x1": ((24, 20, 1, 1), (5, 6), 7, (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "1x1 of many samples": ((40, 33, 1, 1), (6, 6), 16, (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "1x1 strided": ((24, 20, 1, 1), (5, 6), 32, (2, 2), (0, 0, 0, 0), (1, 1), 1),
    "1x1 strided, one sample": ((24, 20, 1, 1), (9, 10), 1, (2, 2), (0, 0, 0, 0), (1, 1), 1),
    "3x3": ((28, 12, 3, 3), (9, 8), 17, (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "3x3, one sample": ((30, 12, 3, 3), (14, 14), 1, (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "3x3 strided": ((28, 12, 3, 3), (9, 8), 32, (2, 2), (1, 1, 1, 1), (1, 1), 1),
    "3x3 strided, few samples": ((28, 12, 3, 3), (13, 12), 3, (2, 2), (1, 1, 1, 1), (1, 1), 1),
    "3x3 of few channels, wide": ((32, 3, 3, 3), (20, 70), 48, (2, 2), (1, 1, 1, 1), (1, 1), 1, 1.0),
    "3x3, wide, more samples than a slice has": ((28, 8, 3, 3), (3, 40), 176, (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "in blocks": ((33, 900, 3, 3), (5, 5), 16, (1, 1), (1, 1, 1, 1), (1, 1), 1, 0.02),
    "uneven padding": ((9, 5, 2, 3), (6, 7), 3, (1, 2), (2, 0, 1, 3), (1, 1), 1),
    "groups, dilated": ((16, 4, 3, 3), (8, 9), 16, (1, 1), (2, 2, 2, 2), (2, 2), 2),
    "depthwise": ((6, 1, 3, 3), (7, 7), 16, (1, 1), (1, 1, 1, 1), (1, 1), 6, 1.0),
    "depthwise, two columns": ((6, 1, 5, 5), (9, 8), 32, (2, 2), (2, 2, 2, 2), (1, 1), 6, 1.0),
    "depthwise, one sample": ((6, 1, 3, 3), (14, 13), 1, (1, 1), (1, 1, 1, 1), (1, 1), 6, 1.0),
    "depthwise strided, one sample": ((6, 1, 3, 3), (14, 13), 1, (2, 2), (0, 0, 1, 1), (1, 1), 6, 1.0),
    "depthwise, far taps": ((6, 1, 2, 2), (9, 9), 3, (1, 1), (8, 8, 8, 8), (16, 16), 6, 1.0),
    "beyond the caches": ((40, 6, 1, 1), (64, 64), 16, (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "depthwise beyond the caches": ((40, 1, 3, 3), (40, 44), 16, (1, 1), (1, 1, 1, 1), (1, 1), 40, 1.0),
    "nothing left": ((8, 6, 3, 3), (5, 5), 4, (1, 1), (1, 1, 1, 1), (1, 1), 1, 0.0),
}


def _case(name):
    shape, size, batch, stride, padding, dilation, groups, *density = CASES[name]
    generator = torch.Generator().manual_seed(sum(shape) + batch)
    weight = sparse_weight(shape, *density or [0.3], generator)
    x = torch.randn(batch, shape[1] * groups, *size, generator=generator)
    pattern, values = pattern_of(weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    norm = [torch.rand(shape[0], generator=generator) + 0.5 for _ in range(4)]  # weight, bias, mean, variance
    conv = (tuple(weight.shape), stride, padding, dilation, groups)
    return as_stored(x, "batch_last"), weight, pattern.tensors, values, norm, conv


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_against_float64(isa, name, threads):
    torch.set_num_threads(threads)
    x, weight, pattern, values, norm, conv = _case(name)
    bias = torch.randn(len(weight))
    plain = dense_conv2d(x.double(), weight.double(), bias.double(), *conv[1:])
    residual = torch.randn(plain.shape)
    shift, scale = (t.double().view(1, -1, 1, 1) for t in (norm[2], (norm[3].double() + 1e-3).rsqrt()))
    normalised = (plain - shift) * scale * norm[0].double().view(1, -1, 1, 1) + norm[1].double().view(1, -1, 1, 1)
    for activation in Activation:
        for added in (None, residual, as_stored(residual, "batch_last")):
            want = normalised if added is None else normalised + added.double()
            got = conv2d_norm(x, values, bias, pattern, *conv, *norm, 1e-3, added, activation)
            want = activations.activate(want, activation)
            size = max(1.0, float(want.abs().max()))
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_to_the_last_bit(isa, name, dtype):
    """The same as the convolution and the norm one after another."""
    x, weight, pattern, values, norm, conv = _case(name)
    x = as_stored(x.to(dtype), "batch_last")
    y = conv2d(x, values, None, pattern, *conv)
    residual = as_stored(torch.randn(y.shape).to(dtype), "batch_last")
    for activation in Activation:
        for added in (None, residual):
            want = batch_norm(y, *norm, 1e-5, added, activation)[0]
            assert torch.equal(conv2d_norm(x, values, None, pattern, *conv, *norm, 1e-5, added, activation), want)


def test_without_a_norm(isa):
    x, weight, pattern, values, norm, conv = _case("3x3")
    nothing = (None, None, None, None, 0.0)
    y = conv2d(x, values, None, pattern, *conv)
    residual = torch.randn(y.shape)
    got = conv2d_norm(x, values, None, pattern, *conv, *nothing, residual, Activation.RELU)
    assert torch.equal(got, (y + residual).relu())
    assert torch.equal(conv2d_norm(x, values, None, pattern, *conv, *nothing, None, Activation.IDENTITY), y)


@pytest.mark.parametrize("channel", ["input", "mean", "variance", "residual"])
def test_not_finite(isa, channel):
    """NaN and infinity go where they go without the fusion."""
    x, weight, pattern, values, norm, conv = _case("3x3")
    residual = as_stored(torch.randn(conv2d(x, values, None, pattern, *conv).shape), "batch_last")
    spoilt = {"input": x, "mean": norm[2], "variance": norm[3], "residual": residual}[channel]
    for value in (torch.nan, torch.inf, -torch.inf):
        spoilt[3 if spoilt.dim() == 1 else (0, 2, 1, 1)] = value
        y = conv2d(x, values, None, pattern, *conv)
        for activation in Activation:
            want = batch_norm(y, *norm, 1e-5, residual, activation)[0]
            got = conv2d_norm(x, values, None, pattern, *conv, *norm, 1e-5, residual, activation)
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_gradients():
    x, weight, pattern, values, norm, conv = _case("3x3 strided, few samples")
    leaves = [t.double().requires_grad_(True) for t in (x[:2, :, :5, :6].clone(), values, *norm[:2])]
    residual = torch.randn(conv2d(leaves[0], values.double(), None, pattern, *conv).shape).double().requires_grad_()

    def function(x, values, weight, bias, residual):
        statistics = (norm[2].double(), norm[3].double())
        return torch.ops.sparse_ft.conv2d_norm(
            x, values, None, pattern, *conv, weight, bias, *statistics, 1e-5, residual, Activation.SILU
        )

    assert torch.autograd.gradcheck(function, (*leaves, residual), fast_mode=True)


def test_other_dtypes_run_on_the_reference():
    x, weight, pattern, values, norm, conv = _case("1x1")
    want = conv2d_norm(x, values, None, pattern, *conv, *norm, 1e-5, None, Activation.RELU)
    wide = [t.double() for t in norm]
    got = conv2d_norm(x.double(), values.double(), None, pattern, *conv, *wide, 1e-5, None, Activation.RELU)
    torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-5)


def test_arguments():
    x, weight, pattern, values, norm, conv = _case("1x1")
    call = torch.ops.sparse_ft.conv2d_norm

    def error(text, *what):
        with pytest.raises(ValueError, match=text):
            call(x, values, None, pattern, *conv, *what)

    error("weight must have 24 values", torch.ones(23), *norm[1:], 1e-5, None, 0)
    error("mean and variance together, or nothing of a norm", *norm[:3], None, 1e-5, None, 0)
    error("or nothing of a norm", norm[0], None, None, None, 1e-5, None, 0)
    error("the residual must have shape", *norm, 1e-5, torch.ones(7, 24, 5, 5), 0)
    error("activation must be one of", *norm, 1e-5, None, 7)


def test_shapes_are_known_without_data():
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, weight, pattern, values, norm, conv = _case("3x3 strided")
    want = torch.ops.sparse_ft.conv2d_norm(x, values, None, pattern, *conv, *norm, 1e-5, None, 1)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, values, *norm)]
        got = torch.ops.sparse_ft.conv2d_norm(
            fake[0], fake[1], None, [mode.from_tensor(t) for t in pattern], *conv, *fake[2:], 1e-5, None, 1
        )
    assert (got.shape, got.stride()) == (want.shape, want.stride())
