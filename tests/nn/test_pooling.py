"""Pooling in batch-last layout: torch's results and gradients, in the layout that came in."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

from sparse_ft import ops
from sparse_ft.nn import follow_layout, restore_stock
from sparse_ft.ops import BATCH_LAST, is_batch_last

PAIRS = st.tuples(st.integers(1, 4), st.integers(1, 4))
TYPES = st.sampled_from([torch.float32, torch.bfloat16])
SHAPES = st.tuples(st.integers(4, 37), st.integers(1, 5), st.integers(1, 12), st.integers(1, 12))
quickly = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=ops.available_isas())
def isa(request):
    before = ops.active_isa()
    ops.activate_isa(request.param)
    yield request.param
    ops.activate_isa(before)


def check(stock: nn.Module, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    pool, x = copy.deepcopy(stock), x.to(dtype)
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert follow_layout(pool)
    one = x.detach().double().requires_grad_(True)
    two = torch.ops.sparse_ft.to_layout(x.detach(), BATCH_LAST).requires_grad_(True)
    try:
        want = stock(one)
    except RuntimeError as error:  # torch refuses the numbers
        with pytest.raises(RuntimeError, match=str(error)[:20].replace("(", ".").replace(")", ".")):
            pool(two)
        return
    y = pool(two)
    assert is_batch_last(y) and y.shape == want.shape
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), want, rtol=1e-5 + rounding, atol=1e-6, equal_nan=True)
    grad = torch.randn_like(want).to(dtype)
    (want_grad,) = torch.autograd.grad(want, one, grad.double())
    (got_grad,) = torch.autograd.grad(y, two, grad)
    assert is_batch_last(got_grad)
    torch.testing.assert_close(got_grad.double(), want_grad, rtol=1e-5 + rounding, atol=1e-5)


@given(
    shape=SHAPES, kernel=PAIRS, stride=PAIRS, dilation=PAIRS, ceil=st.booleans(), data=st.data(),
    integers=st.booleans(), threads=st.sampled_from([1, 2]), dtype=TYPES,
)  # fmt: skip
@quickly
def test_max(isa, shape, kernel, stride, dilation, ceil, data, integers, threads, dtype):
    torch.set_num_threads(threads)
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    assume(all(s + 2 * p >= (k - 1) * d + 1 for s, p, k, d in zip(shape[2:], padding, kernel, dilation, strict=True)))
    # torch 2.14 writes out of bounds in the backward pass of a window whose taps all lie in the padding.
    assume(dilation == (1, 1) or padding == (0, 0))
    x = torch.randn(shape)
    if integers:  # many equal ones: the first of a window has the gradient
        x = x.round()
    check(nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil), x, dtype)


@given(
    shape=SHAPES, kernel=PAIRS, stride=PAIRS, ceil=st.booleans(), count=st.booleans(),
    divisor=st.sampled_from([None, None, 3, -2]), data=st.data(), dtype=TYPES,
)  # fmt: skip
@quickly
def test_average(isa, shape, kernel, stride, ceil, count, divisor, data, dtype):
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    assume(all(s + 2 * p >= k for s, p, k in zip(shape[2:], padding, kernel, strict=True)))
    check(nn.AvgPool2d(kernel, stride, padding, ceil, count, divisor), torch.randn(shape), dtype)


@given(shape=SHAPES, output=st.tuples(*[st.one_of(st.none(), st.integers(1, 14))] * 2), dtype=TYPES)
@quickly
def test_adaptive_average(isa, shape, output, dtype):
    check(nn.AdaptiveAvgPool2d(output), torch.randn(shape), dtype)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(isa, value):
    x = torch.randn(5, 3, 6, 6)
    x[:, :, 2:4, 1] = value
    x[1, 0] = value
    for stock in (nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2)):
        check(stock, x)
    pool = nn.AvgPool2d(2)
    want = pool(x)
    follow_layout(pool)
    y = pool(torch.ops.sparse_ft.to_layout(x, BATCH_LAST))
    torch.testing.assert_close(y, want, equal_nan=True)


@pytest.mark.parametrize(
    "stock",
    [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(20, 1, 10), nn.AvgPool2d(2),
     nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d((3, None))],
)  # fmt: skip
def test_other_forms_are_torchs(stock):
    pool = copy.deepcopy(stock)
    assert follow_layout(pool)
    x = torch.randn(6, 3, 12, 12)
    inputs = [x, x.contiguous(memory_format=torch.channels_last), x.double(), x[0]]
    inputs += [torch.ops.sparse_ft.to_layout(x, BATCH_LAST).double(), torch.ops.sparse_ft.to_layout(x[:2], BATCH_LAST)]
    for one in inputs:
        for a, b in zip(tree_leaves(pool(one)), tree_leaves(stock(one)), strict=True):
            assert torch.equal(a, b)
    want, got = stock(x), pool(torch.ops.sparse_ft.to_layout(x, BATCH_LAST))
    for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b)
    restore_stock(pool)
    assert type(pool) is type(stock)


@pytest.mark.parametrize("output", [-1, 0])
def test_sizes_that_torch_refuses(output):
    pool = nn.AdaptiveAvgPool2d(output)
    x = torch.randn(6, 3, 4, 4)
    results = []
    for module, one in ((copy.deepcopy(pool), x), (pool, torch.ops.sparse_ft.to_layout(x, BATCH_LAST))):
        follow_layout(module)
        try:
            results.append(tuple(module(one).shape))
        except RuntimeError as error:
            results.append(str(error)[:30])
    assert results[0] == results[1]


def test_windows_are_checked():
    x = torch.randn(4, 2, 5, 5)
    for first, kernel, step in ((5, (1, 1), 1), (-3, (3, 1), 1), (0, (16, 16), 1), (-1, (2, 1), 7)):
        with pytest.raises(ValueError, match="pooling"):
            torch.ops.sparse_ft.max_pool2d(x, [first], [0], kernel, (step, 1))
    for windows in (([0], [6], [1.0]), ([-1], [2], [1.0]), ([3], [2], [1.0]), ([0, 1], [2], [1.0])):
        with pytest.raises(ValueError, match="pooling window"):
            torch.ops.sparse_ft.avg_pool2d(x, *windows, [0], [1], [1.0])
