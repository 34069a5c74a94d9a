"""A depthwise convolution with the norms on both sides of it: one pass, the results of several."""

import pytest
import torch
from oracle import DTYPES, as_stored, dense_conv2d, pattern_of, sparse_weight

from sparse_ft.ops import Activation, activations

ops = torch.ops.sparse_ft

# channels, kernel, size, batch, stride, padding, dilation, density
CASES = {
    "3x3": (6, (3, 3), (9, 8), 16, (1, 1), (1, 1, 1, 1), (1, 1), 1.0),
    "rows in several strips": (2, (3, 3), (40, 33), 32, (1, 1), (1, 1, 1, 1), (1, 1), 1.0),
    "strided": (5, (3, 3), (9, 8), 16, (2, 2), (1, 1, 1, 1), (1, 1), 1.0),
    "strided, in several strips": (2, (3, 3), (45, 64), 32, (2, 2), (0, 1, 1, 0), (1, 1), 1.0),
    "uneven stride and padding": (4, (2, 3), (7, 9), 7, (1, 2), (2, 0, 1, 3), (1, 1), 1.0),
    "dilated": (4, (3, 3), (12, 11), 16, (1, 1), (2, 2, 2, 2), (2, 2), 1.0),
    "dilated without padding": (4, (3, 2), (12, 11), 16, (2, 1), (0, 0, 0, 0), (3, 2), 1.0),
    "5x5": (3, (5, 5), (8, 8), 17, (2, 2), (2, 2, 2, 2), (1, 1), 1.0),
    "a stride beyond the kernel": (4, (1, 1), (7, 8), 16, (3, 2), (0, 0, 0, 0), (1, 1), 1.0),
    "1x1": (4, (1, 1), (5, 6), 16, (1, 1), (0, 0, 0, 0), (1, 1), 1.0),
    "padding wider than the image": (3, (3, 3), (2, 3), 16, (1, 1), (4, 3, 4, 3), (1, 1), 1.0),
    "few nonzeros": (20, (3, 3), (6, 6), 16, (1, 1), (1, 1, 1, 1), (1, 1), 0.2),
    "no nonzeros": (4, (3, 3), (6, 6), 16, (1, 1), (1, 1, 1, 1), (1, 1), 0.0),
    "one sample": (6, (3, 3), (9, 8), 1, (1, 1), (1, 1, 1, 1), (1, 1), 1.0),
}
CHEAP = (Activation.IDENTITY, Activation.RELU, Activation.RELU6, Activation.HARDSWISH)


def case(name, dtype=torch.float32):
    channels, kernel, size, batch, stride, padding, dilation, density = CASES[name]
    generator = torch.Generator().manual_seed(sum(size) + batch)
    weight = sparse_weight((channels, 1, *kernel), density, generator)
    x = as_stored((torch.randn(batch, channels, *size, generator=generator) * 3 + 1).to(dtype), "batch_last")
    inner, outer = ([torch.rand(channels, generator=generator) + 0.5 for _ in range(2)] for _ in range(2))
    pattern, values = pattern_of(weight, stride=stride, padding=padding, dilation=dilation, groups=channels)
    conv = (tuple(weight.shape), stride, padding, dilation, channels)
    return x, inner, outer, weight, pattern, values, conv


def fused(x, inner, inner_act, outer, outer_act, values, pattern, conv, gradient):
    """(y, gradients) by the operators; `gradient(y)` is of what follows the outer norm."""
    mean, variance = ops.batch_norm_statistics(x)
    norm = (*inner, mean, rstd(variance), inner_act)
    y, y_mean, y_variance = ops.norm_depthwise(x, *norm, True, values, None, pattern, *conv)
    outer = (*outer, y_mean, rstd(y_variance), outer_act)
    return y, ops.norm_depthwise_backward(gradient(y), y, *outer, x, *norm, True, values, pattern, *conv)


def rstd(variance, eps=1e-5):
    return (variance.double() + eps).rsqrt().to(variance.dtype)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_against_float64(isa, name, threads):
    torch.set_num_threads(threads)
    x, inner, outer, weight, pattern, values, conv = case(name)

    def norm(x, weight, bias, activation):
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        per_channel = (1, -1, 1, 1)
        v = (x - mean) * (variance + 1e-5).rsqrt() * weight.view(per_channel) + bias.view(per_channel)
        return activations.activate(v, activation)

    for inner_act, outer_act in zip(Activation, reversed(Activation), strict=True):
        leaves = [t.double().requires_grad_(True) for t in (x, *inner, weight, *outer)]
        y_wide = dense_conv2d(norm(leaves[0], *leaves[1:3], inner_act), leaves[3], None, *conv[1:])
        result = norm(y_wide, *leaves[4:], outer_act)
        grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(0))
        result.backward(grad.double())

        y, grads = fused(
            x, inner, inner_act, outer, outer_act, values, pattern.tensors, conv, lambda y, grad=grad: grad
        )
        want = [t.grad for t in leaves[:3]] + [pattern.from_dense(leaves[3].grad)] + [t.grad for t in leaves[4:]]
        for got, right in zip([y, *grads], [y_wide, *want], strict=True):
            largest = max(1.0, float(right.detach().abs().max())) if right.numel() else 1.0
            torch.testing.assert_close(got.double(), right.view(got.shape), rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_as_one_pass_after_another(isa, name, dtype):
    """To the last bit, so that training does not depend on what was computed together."""
    x, inner, outer, _, pattern, values, conv = case(name, dtype)
    for inner_act in CHEAP:
        for outer_act in Activation:
            activated, mean, inner_rstd, _ = ops.batch_norm(x, *inner, None, None, 1e-5, None, inner_act)
            want = ops.conv2d(activated, values, None, pattern.tensors, *conv)
            y_mean, y_variance = ops.batch_norm_statistics(want)
            grad = as_stored(torch.randn(want.shape).to(dtype), "batch_last")
            back = ops.batch_norm_backward(grad, want, *outer, y_mean, rstd(y_variance), None, None, outer_act, True)
            value_grad = ops.conv2d_weight_grad(back[0], activated, pattern.tensors, *conv)
            through = ops.conv2d_input_grad(back[0], values, pattern.tensors, *conv, list(x.shape))
            first = ops.batch_norm_backward(through, x, *inner, mean, inner_rstd, None, None, inner_act, True)

            y, grads = fused(
                x, inner, inner_act, outer, outer_act, values, pattern.tensors, conv, lambda y, grad=grad: grad
            )
            assert torch.equal(y, want)
            for got, right in zip(grads, (*first[:3], value_grad, *back[1:3]), strict=True):
                assert torch.equal(got, right)


def test_given_statistics(isa):
    """An inner norm whose statistics are not x's own sends its gradient straight through."""
    x, inner, outer, _, pattern, values, conv = case("3x3")
    mean, scale = torch.rand(6), torch.rand(6) + 0.5
    norm = (*inner, mean, scale, Activation.RELU)
    y, y_mean, y_variance = ops.norm_depthwise(x, *norm, False, values, None, pattern.tensors, *conv)
    outer = (*outer, y_mean, rstd(y_variance), Activation.IDENTITY)
    grad = torch.randn(y.shape)
    got = ops.norm_depthwise_backward(grad, y, *outer, x, *norm, False, values, pattern.tensors, *conv)
    wide = ops.norm_depthwise_backward(
        *(t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in (grad, y, *outer, x, *norm)),
        False, values.double(), pattern.tensors, *conv,
    )  # fmt: skip
    for a, b in zip(got, wide, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_only_depthwise_convolutions(isa):
    weight = sparse_weight((6, 2, 3, 3), 1.0, torch.Generator().manual_seed(0))
    pattern, values = pattern_of(weight, padding=(1, 1, 1, 1), groups=3)
    flat = torch.ones(6)
    with pytest.raises(ValueError, match="a filter for each channel"):
        ops.norm_depthwise(
            torch.randn(2, 6, 5, 5), None, None, flat, flat, 0, True, values, None, pattern.tensors, (6, 2, 3, 3),
            (1, 1), (1, 1, 1, 1), (1, 1), 3,
        )  # fmt: skip
