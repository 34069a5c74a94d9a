"""Max pooling of an activated norm: one pass, to the last bit what several give, which have tests of their own."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, as_stored

from sparse_ft.nn.pooling import _max_windows
from sparse_ft.ops import Activation

ops = torch.ops.sparse_ft

# channels, size, batch, kernel, stride, padding, dilation
CASES = {
    "ResNet's": (5, (20, 17), 16, (3, 3), (2, 2), (1, 1), (1, 1)),
    "rows in several strips": (3, (50, 33), 32, (3, 3), (2, 2), (1, 1), (1, 1)),
    "windows that touch": (4, (8, 9), 16, (2, 2), (2, 2), (0, 0), (1, 1)),
    "windows with gaps": (4, (11, 12), 16, (2, 2), (4, 3), (0, 0), (1, 1)),
    "dilated": (4, (12, 11), 16, (3, 2), (1, 2), (1, 1), (2, 3)),
    "one window": (3, (5, 4), 16, (5, 4), (1, 1), (0, 0), (1, 1)),
    "an odd batch": (6, (9, 8), 7, (3, 3), (2, 2), (1, 1), (1, 1)),
    "one sample": (6, (9, 8), 1, (3, 3), (2, 2), (1, 1), (1, 1)),
    "large": (9, (40, 40), 80, (3, 3), (2, 2), (1, 1), (1, 1)),  # is stored around the caches
}


ANY_ORDER = "windows in any order"  # as the operator takes them; rows that wait must not be dropped too early
CASES[ANY_ORDER] = (3, (60, 33), 32)


def case(name, dtype):
    channels, size, batch, *geometry = CASES[name]
    generator = torch.Generator().manual_seed(sum(size) + batch)
    x = as_stored((torch.randn(batch, channels, *size, generator=generator) * 3 + 1).to(dtype), "batch_last")
    weight, bias = (torch.rand(channels, generator=generator) - 0.3 for _ in range(2))
    if name == ANY_ORDER:
        return x, weight, bias, ([50, 0, 57, 20, -2, 31], [30, 1, 0], (5, 2), (2, 3))
    return x, weight, bias, _max_windows(size, *geometry, False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_same_as_one_by_one(isa, name, threads, training, dtype):
    torch.set_num_threads(threads)
    x, weight, bias, windows = case(name, dtype)
    mean, variance = ops.batch_norm_statistics(x)
    for activation in (Activation.RELU, Activation.HARDSWISH, Activation.SILU):
        activated, _, rstd, _ = ops.batch_norm(x, weight, bias, mean, variance, 1e-5, None, activation, training)
        want, want_chosen = ops.max_pool2d(activated, *windows)
        y, chosen = ops.norm_max_pool2d(x, weight, bias, mean, rstd, activation, training, *windows)
        assert torch.equal(y, want) and torch.equal(chosen, want_chosen)
        grad = as_stored(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype), "batch_last")
        through = ops.max_pool2d_backward(grad, chosen, *windows, x.shape)
        wanted = ops.batch_norm_backward(
            through, x, weight, bias, mean, rstd, None, None, activation, training
        )  # fmt: skip
        got = ops.norm_max_pool2d_backward(
            grad, chosen, x, weight, bias, mean, rstd, activation, training, *windows
        )  # fmt: skip
        assert all(map(torch.equal, got, wanted[:3]))


def test_against_float64():
    """The steps together, by torch."""
    x, weight, bias, windows = case("ResNet's", torch.float32)
    wide = [t.double().requires_grad_() for t in (x, weight, bias)]
    want = F.max_pool2d(F.relu(F.batch_norm(wide[0], None, None, *wide[1:], True)), 3, 2, 1)
    grad = torch.randn(want.shape)
    want.backward(grad.double())
    mean, variance = ops.batch_norm_statistics(x)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    rstd = (variance.double() + 1e-5).rsqrt().float()
    y, _ = ops.norm_max_pool2d(*leaves, mean, rstd, Activation.RELU, True, *windows)
    y.backward(grad)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    for got, right in zip(leaves, wide, strict=True):
        torch.testing.assert_close(got.grad.double(), right.grad, rtol=1e-4, atol=1e-4)


def test_arguments():
    x, weight, bias, windows = case("ResNet's", torch.float32)
    mean, variance = ops.batch_norm_statistics(x)
    norm = (weight, bias, mean, variance, 1, True)
    y, chosen = ops.norm_max_pool2d(x, *norm, *windows)

    def error(text, call):
        with pytest.raises(ValueError, match=text):
            call()

    error("weight must have 5 values", lambda: ops.norm_max_pool2d(x, weight[:4], *norm[1:], *windows))
    error("activation must be one of", lambda: ops.norm_max_pool2d(x, *norm[:4], 9, True, *windows))
    error("lies outside", lambda: ops.norm_max_pool2d(x, *norm, [40], *windows[1:]))
    error("gradient must have", lambda: ops.norm_max_pool2d_backward(y[:, :, 1:], chosen, x, *norm, *windows))
    error("choice must have", lambda: ops.norm_max_pool2d_backward(y, chosen[1:], x, *norm, *windows))
