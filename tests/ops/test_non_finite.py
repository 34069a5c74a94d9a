"""NaN and Inf go where a product carries them, and nowhere else: a pruned weight does not multiply."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import pattern_of, sparse_weight

VALUES = [torch.nan, torch.inf, -torch.inf]


def _conv_products(x, weight, bias, grad, stride, padding, dilation):
    """The three products nonzero by nonzero, in float64; padding multiplies, as it does in torch."""
    top, left, bottom, right = padding
    height, width = grad.shape[2:]
    padded = F.pad(x.double(), (left, right, top, bottom))
    y = bias.double().view(1, -1, 1, 1).expand(grad.shape).clone()
    grad_padded, grad_weight = torch.zeros_like(padded), torch.zeros_like(weight, dtype=torch.float64)
    for o, i, ky, kx in weight.nonzero().tolist():
        window = (
            slice(None), i,
            slice(ky * dilation[0], ky * dilation[0] + (height - 1) * stride[0] + 1, stride[0]),
            slice(kx * dilation[1], kx * dilation[1] + (width - 1) * stride[1] + 1, stride[1]),
        )  # fmt: skip
        w = weight[o, i, ky, kx].double()
        y[:, o] += w * padded[window]
        grad_padded[window] += w * grad[:, o].double()
        grad_weight[o, i, ky, kx] = (grad[:, o].double() * padded[window]).sum()
    return y, grad_padded[:, :, top : top + x.shape[2], left : left + x.shape[3]], grad_weight


def _assert_same(got, want):
    """NaN where NaN is, the same infinity, and finite values near."""
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4, equal_nan=True)


@given(
    batch=st.sampled_from([1, 3, 16, 17, 50, 100, 200]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    places=st.lists(st.tuples(st.sampled_from(VALUES), st.integers(0, 2**16)), min_size=1, max_size=3),
    where=st.sampled_from(["input", "gradient", "both"]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=40)
def test_conv2d(isa, batch, kernel, stride, padding, places, where, seed):
    generator = torch.Generator().manual_seed(seed)
    geometry = (stride, padding, (1, 1), 1)
    weight = sparse_weight((5, 3, *kernel), 0.4, generator)
    pattern, values = pattern_of(weight, padding, stride=stride)
    x, bias = torch.randn(batch, 3, 5, 6, generator=generator), torch.randn(5, generator=generator)
    args = (values, bias, pattern.tensors, weight.shape, *geometry)
    grad = torch.randn(torch.ops.sparse_ft.conv2d(x, *args).shape, generator=generator)
    for value, place in places:
        if where != "gradient":
            x.view(-1)[place % x.numel()] = value
        if where != "input":
            grad.view(-1)[place % grad.numel()] = value
    y = torch.ops.sparse_ft.conv2d(x, *args)
    grad_x = torch.ops.sparse_ft.conv2d_input_grad(
        grad, values, pattern.tensors, weight.shape, *geometry, list(x.shape)
    )
    grad_values = torch.ops.sparse_ft.conv2d_weight_grad(grad, x, pattern.tensors, weight.shape, *geometry)
    want_y, want_grad_x, want_grad_weight = _conv_products(x, weight, bias, grad, stride, padding, (1, 1))
    _assert_same(y, want_y)
    _assert_same(grad_x, want_grad_x)
    _assert_same(grad_values, pattern.from_dense(want_grad_weight))


@given(
    tokens=st.sampled_from([1, 5, 16, 33, 100, 250]),
    places=st.lists(st.tuples(st.sampled_from(VALUES), st.integers(0, 2**16)), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30)
def test_linear(isa, tokens, places, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = sparse_weight((9, 14), 0.3, generator)
    pattern, values = pattern_of(weight)
    x, grad = torch.randn(tokens, 14, generator=generator), torch.randn(tokens, 9, generator=generator)
    for value, place in places:
        x.view(-1)[place % x.numel()] = value
        grad.view(-1)[(place * 7) % grad.numel()] = value
    y = torch.ops.sparse_ft.linear(x, values, None, pattern.tensors, 14, 9)
    grad_x = torch.ops.sparse_ft.linear_input_grad(grad, values, pattern.tensors, 14, 9)
    grad_values = torch.ops.sparse_ft.linear_weight_grad(grad, x, pattern.tensors, 14, 9)
    want_y, want_grad_x = torch.zeros(tokens, 9).double(), torch.zeros(tokens, 14).double()
    want_grad_weight = torch.zeros(9, 14).double()
    for o, i in weight.nonzero().tolist():
        want_y[:, o] += weight[o, i].double() * x[:, i].double()
        want_grad_x[:, i] += weight[o, i].double() * grad[:, o].double()
        want_grad_weight[o, i] = (grad[:, o].double() * x[:, i].double()).sum()
    _assert_same(y, want_y)
    _assert_same(grad_x, want_grad_x)
    _assert_same(grad_values, pattern.from_dense(want_grad_weight))


@pytest.mark.parametrize("value", VALUES)
def test_weights(isa, value):
    """A non-finite weight spoils its own row forward and its own channel backward."""
    weight = torch.zeros(4, 3, 3, 3)
    weight[1, 2, 0, 1], weight[3, 0, 1, 1] = value, 1.0
    pattern, values = pattern_of(weight, (1, 1, 1, 1))
    args = (pattern.tensors, weight.shape, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    y = torch.ops.sparse_ft.conv2d(torch.rand(5, 3, 4, 4) + 1, values, None, *args)
    assert not y[:, 1].isfinite().any() and y[:, [0, 2, 3]].isfinite().all()
    grad_x = torch.ops.sparse_ft.conv2d_input_grad(torch.rand(5, 4, 4, 4) + 1, values, *args, [5, 3, 4, 4])
    assert not grad_x[:, 2, :3].isfinite().any() and grad_x[:, :2].isfinite().all()
    bias = torch.tensor([0.0, 0.0, value, 0.0])
    y = torch.ops.sparse_ft.conv2d(torch.rand(5, 3, 4, 4), torch.ones_like(values), bias, *args)
    assert not y[:, 2].isfinite().any() and y[:, [0, 1, 3]].isfinite().all()
