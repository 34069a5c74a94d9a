"""A convolution of a norm's activation that is computed on its way in."""

import pytest
import torch
from oracle import DTYPES, ROUNDING, as_stored, dense_conv2d, pattern_of, sparse_weight

from sparse_ft.ops import Activation, activations


def _case(shape, size, batch, stride, padding, dilation, groups, density=0.3):
    generator = torch.Generator().manual_seed(sum(shape) + batch)
    weight = sparse_weight(shape, density, generator)
    channels = shape[1] * groups
    x = torch.randn(batch, channels, *size, generator=generator) * 3 + 1
    norm = [torch.rand(channels, generator=generator) + 0.5 for _ in range(4)]  # weight, bias, mean, rstd
    pattern, values = pattern_of(weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    conv = (tuple(weight.shape), stride, padding, dilation, groups)
    return x, norm, weight, pattern, values, conv


CASES = {
    "1x1": ((24, 20, 1, 1), (5, 6), 7, (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "1x1 of many samples": ((40, 33, 1, 1), (6, 6), 16, (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "1x1 strided": ((24, 20, 1, 1), (5, 6), 32, (2, 2), (0, 0, 0, 0), (1, 1), 1),
    "3x3": ((28, 12, 3, 3), (9, 8), 17, (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "3x3 strided": ((28, 12, 3, 3), (9, 8), 32, (2, 2), (1, 1, 1, 1), (1, 1), 1),
    "uneven padding": ((9, 5, 2, 3), (6, 7), 3, (1, 2), (2, 0, 1, 3), (1, 1), 1),
    "groups, dilated": ((16, 4, 3, 3), (8, 9), 16, (1, 1), (2, 2, 2, 2), (2, 2), 2),
    "depthwise": ((6, 1, 3, 3), (7, 7), 16, (1, 1), (1, 1, 1, 1), (1, 1), 6, 1.0),
    "one sample": ((17, 9, 3, 3), (4, 4), 1, (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "nothing left": ((8, 6, 3, 3), (5, 5), 4, (1, 1), (1, 1, 1, 1), (1, 1), 1, 0.0),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_float64(isa, name, threads, dtype):
    torch.set_num_threads(threads)
    x, (scale, shift, mean, rstd), weight, pattern, values, conv = _case(*CASES[name])
    x = x.to(dtype)
    for activation in Activation:
        wide = x.double().requires_grad_(True)
        leaves = [t.double().requires_grad_(True) for t in (scale, shift, weight)]
        per_channel = (1, -1, 1, 1)
        v = (wide - mean.double().view(per_channel)) * rstd.double().view(per_channel)
        v = v * leaves[0].view(per_channel) + leaves[1].view(per_channel)
        want = dense_conv2d(activations.activate(v, activation), leaves[2], None, *conv[1:])
        grad = torch.randn(want.shape).to(dtype)
        want.backward(grad.double())

        mine = [t.clone().requires_grad_(True) for t in (as_stored(x, "batch_last"), scale, shift, values)]
        y = torch.ops.sparse_ft.norm_conv2d(
            *mine[:3], mean, rstd, activation, False, mine[3], None, pattern.tensors, *conv
        )
        y.backward(as_stored(grad, "batch_last"))
        expected = [wide.grad, leaves[0].grad, leaves[1].grad, pattern.from_dense(leaves[2].grad)]
        for got, right in zip([y, *(t.grad for t in mine)], [want, *expected], strict=True):
            scale_of = max(1.0, float(right.detach().abs().max())) if right.numel() else 1.0
            # What the convolution reads and the gradient that goes on to the norm are rounded, too.
            atol = (2e-5 + 4 * ROUNDING[dtype]) * scale_of
            rtol = 1e-4 + ROUNDING[got.dtype]
            torch.testing.assert_close(got.double(), right.view(got.shape), rtol=rtol, atol=atol)


def test_padding_stays_zero(isa):
    """The activation of a zero is not what lies outside the image."""
    x, (scale, shift, mean, rstd), _, _, _, _ = _case(*CASES["3x3"])
    weight = torch.ones(28, 12, 3, 3)
    pattern, values = pattern_of(weight, padding=(1, 1, 1, 1))
    conv = ((28, 12, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    flat = torch.zeros(12)
    y = torch.ops.sparse_ft.norm_conv2d(
        torch.zeros_like(x), None, torch.ones(12), flat, torch.ones(12), 0, False, values, None, pattern.tensors, *conv
    )
    assert (y[:, :, 0, 0] == 4 * 12).all() and (y[:, :, 0, 1] == 6 * 12).all() and (y[:, :, 1, 1] == 9 * 12).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in CASES if name != "depthwise"])
def test_the_same_as_of_a_stored_activation(isa, name, dtype):
    """To the last bit, so that training does not depend on who computes the norm."""
    x, (scale, shift, _, _), _, pattern, values, conv = _case(*CASES[name])
    x = as_stored(x.to(dtype), "batch_last")
    for activation in (Activation.IDENTITY, Activation.RELU, Activation.HARDSWISH):
        y, mean, rstd, _ = torch.ops.sparse_ft.batch_norm(x, scale, shift, None, None, 1e-5, None, activation)
        want = torch.ops.sparse_ft.conv2d(y, values, None, pattern.tensors, *conv)
        norm = (scale, shift, mean, rstd, activation)
        got = torch.ops.sparse_ft.norm_conv2d(x, *norm, True, values, None, pattern.tensors, *conv)
        assert torch.equal(got, want)
        grad = torch.randn(want.shape).to(dtype)
        want = torch.ops.sparse_ft.conv2d_weight_grad(grad, y, pattern.tensors, *conv)
        assert torch.equal(torch.ops.sparse_ft.norm_conv2d_weight_grad(grad, x, *norm, pattern.tensors, *conv), want)
