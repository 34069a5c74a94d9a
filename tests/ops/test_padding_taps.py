"""Kernel positions that read nothing but padding: they add nothing, and their gradient is zero."""

import pytest
import torch
from torch import nn

import sparse_ft
from sparse_ft import ops

CASES = [  # kernel, stride, padding, dilation, height, width
    (3, 1, 1, 1, 1, 1),  # eight of nine
    (3, 2, 1, 1, 2, 2),  # five of nine
    (3, 2, 1, 1, 1, 4),
    (5, 1, 2, 1, 2, 1),
    (3, 1, 4, 4, 3, 7),  # rows alone
    (7, 3, 3, 1, 1, 1),
    (2, 1, 3, 1, 1, 1),  # output larger than the image
    (1, 2, 1, 1, 1, 1),  # the only tap, from every position
]


@pytest.mark.parametrize("batch", [1, 16, 37, 64])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_follows_dense(isa, case, batch):
    kernel, stride, padding, dilation, height, width = case
    torch.manual_seed(0)
    dense = nn.Conv2d(24, 40, kernel, stride, padding, dilation)
    with torch.no_grad():
        dense.weight.masked_fill_(torch.rand_like(dense.weight) < 0.6, 0.0)
    sparse = sparse_ft.nn.SparseConv2d.from_dense(dense)
    mask = dense.weight != 0
    x = torch.randn(batch, 24, height, width)
    exact, exact_x = dense.double(), x.double().requires_grad_()
    x = torch.ops.sparse_ft.to_layout(x, ops.BATCH_LAST).requires_grad_()
    expected, got = exact(exact_x), sparse(x)
    grad = torch.randn_like(got)
    expected.backward(grad.double())
    got.backward(grad)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-5)
    wanted = exact.weight.grad[mask]
    torch.testing.assert_close(sparse.weight.grad.flatten().double(), wanted, rtol=1e-5, atol=1e-4)
    assert torch.equal(sparse.weight.grad.flatten() == 0, wanted == 0)
