"""The weight gradient of a layer without zeros, which has a kernel of its own."""

import pytest
import torch
from torch import nn

import sparse_ft
from sparse_ft import ops

CASES = [  # in, out, kernel, stride, padding, dilation, height, width
    (3, 64, 7, 2, 3, 1, 20, 23),  # a first convolution
    (3, 64, 7, 2, 3, 1, 70, 66),  # tiles for all threads: with fewer, other kernels compute it
    (3, 70, 7, 2, 3, 1, 9, 40),  # rows beyond a band
    (8, 16, 3, 1, 1, 1, 6, 6),
    (8, 33, 3, 1, 1, 2, 11, 5),
    (67, 48, 1, 1, 0, 1, 7, 7),  # one position for all
    (7, 129, 3, 3, 0, 1, 10, 10),
    (300, 20, 3, 1, 1, 1, 12, 30),  # a panel holds a part of the channels
]


def full(case, batch, dtype=torch.float32):
    inputs, outputs, kernel, stride, padding, dilation, height, width = case
    torch.manual_seed(0)
    dense = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)
    sparse = sparse_ft.nn.SparseConv2d.from_dense(dense, torch.ones_like(dense.weight, dtype=torch.bool))
    x = torch.ops.sparse_ft.to_layout(torch.randn(batch, inputs, height, width).to(dtype), ops.BATCH_LAST)
    return dense.double(), sparse, x


def gradients(dense, sparse, x):
    """(exact, measured)"""
    exact = dense(x.double())
    grad = torch.randn_like(exact).to(x.dtype)
    exact.backward(grad.double())
    measured = torch.ops.sparse_ft.conv2d_weight_grad(grad, x, sparse.pattern.tensors, *sparse.geometry)
    return dense.weight.grad.flatten(), measured.double()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [1, 5, 16, 37])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_follows_dense(isa, case, batch, threads):
    torch.set_num_threads(threads)
    exact, measured = gradients(*full(case, batch))
    torch.testing.assert_close(measured, exact, rtol=1e-5, atol=2e-6 * exact.abs().max().item())


def test_bfloat16(isa):
    exact, measured = gradients(*full(CASES[0], 16, torch.bfloat16))
    torch.testing.assert_close(measured, exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


def test_the_same_for_the_same_threads():
    dense, sparse, x = full(CASES[1], 16)
    torch.set_num_threads(2)
    grad = torch.randn(16, 64, 35, 33)
    runs = [
        torch.ops.sparse_ft.conv2d_weight_grad(grad, x, sparse.pattern.tensors, *sparse.geometry) for _ in range(3)
    ]
    assert all(torch.equal(run, runs[0]) for run in runs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_it_is(isa, value):
    dense, sparse, x = full(CASES[0], 16)
    grad = torch.ones(16, 64, 10, 12)
    grad[3, 5, 4, 4] = value
    measured = torch.ops.sparse_ft.conv2d_weight_grad(grad, x, sparse.pattern.tensors, *sparse.geometry)
    finite = measured.view(64, -1).isfinite().all(1)
    assert finite.tolist() == [row != 5 for row in range(64)]


def test_a_malformed_pattern_is_refused(isa):
    _, sparse, x = full(CASES[0], 16)
    row_ptr, col, *rest = (tensor.clone() for tensor in sparse.pattern.tensors)
    col[7] = 8
    with pytest.raises(ValueError, match="column indices"):
        torch.ops.sparse_ft.conv2d_weight_grad(
            torch.ones(16, 64, 10, 12), x, [row_ptr, col, *rest], *sparse.geometry
        )  # fmt: skip
