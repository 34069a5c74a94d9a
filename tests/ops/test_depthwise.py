"""Depthwise convolutions, which have kernels of their own in batch-last layout."""

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, ROUNDING

from sparse_ft import ops
from sparse_ft.ops import native


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "channels", "size", "kernel", "stride", "padding", "dilation", "density"),
    [
        (16, 5, (9, 11), (3, 3), (1, 1), (1, 1), (1, 1), 1.0),
        (32, 4, (10, 9), (3, 3), (2, 2), (1, 1), (1, 1), 1.0),
        (3, 6, (8, 7), (5, 5), (1, 2), (2, 2), (1, 1), 1.0),  # 25 taps: more than are summed together
        (20, 3, (12, 12), (3, 3), (1, 1), (2, 2), (2, 2), 0.6),
        (7, 8, (6, 5), (3, 3), (3, 3), (0, 0), (1, 1), 0.3),  # empty channels, phases without taps
        (1, 9, (17, 16), (7, 7), (1, 1), (3, 3), (1, 1), 1.0),
        (16, 4, (2, 2), (5, 5), (1, 1), (2, 2), (1, 1), 1.0),  # a kernel larger than the image
        (16, 4, (3, 4), (3, 3), (1, 1), (4, 4), (1, 1), 1.0),  # positions that see padding only
        (64, 40, (24, 24), (3, 3), (1, 1), (1, 1), (1, 1), 1.0),  # results that bypass the caches
        (48, 3, (7, 17), (3, 3), (1, 1), (1, 1), (1, 1), 1.0),  # windows with every number of positions left over
        (32, 3, (13, 15), (5, 5), (1, 1), (2, 2), (1, 1), 1.0),
        (16, 3, (13, 14), (5, 5), (2, 2), (2, 2), (1, 1), 1.0),
        (64, 3, (9, 10), (2, 3), (2, 2), (0, 1), (1, 1), 1.0),
        (32, 3, (9, 16), (3, 3), (1, 1), (1, 1), (1, 1), 0.8),  # some channels are windows, others are not
    ],
)
def test_against_float64(isa, batch, channels, size, kernel, stride, padding, dilation, density, threads, dtype):
    torch.manual_seed(channels)
    torch.set_num_threads(threads)
    weight = torch.randn(channels, 1, *kernel) * (torch.rand(channels, 1, *kernel) < density)
    bias = torch.randn(channels)
    x = torch.randn(batch, channels, *size).to(dtype).double().requires_grad_()
    dense = weight.double().requires_grad_()
    want = F.conv2d(x, dense, bias.double(), stride, padding, dilation, channels)
    grad = torch.randn(want.shape).to(dtype)
    want.backward(grad.double())
    geometry = (tuple(weight.shape), stride, (*padding, *padding), dilation, channels)
    pattern, values = ops.SparsePattern.build(
        weight, stride=stride, padding=padding, dilation=dilation, groups=channels
    )
    source = native.to_layout(x.detach().to(dtype), native.BATCH_LAST)
    sink = native.to_layout(grad, native.BATCH_LAST)

    def close(got, want):
        rtol = 1e-4 + ROUNDING[got.dtype]
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-5 * max(1.0, float(want.abs().max())))

    y, grad_x, value_grad = (torch.full_like(t, torch.nan) for t in (sink, source, values))
    native.conv2d(source, values, bias, pattern.tensors, geometry, out=y)
    native.conv2d_input_grad(sink, values, pattern.tensors, geometry, source.shape, out=grad_x)
    native.conv2d_weight_grad(sink, source, pattern.tensors, geometry, out=value_grad)
    close(y, want.detach())
    close(grad_x, x.grad)
    close(value_grad, pattern.from_dense(dense.grad))


@pytest.mark.parametrize("batch", [16, 5])
def test_channels_with_and_without_the_taps_of_the_one_before(isa, batch):
    """Where they are the same they are found once: the weights must be the channel's own, also in the next call."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    full, corner, none = torch.ones(9), torch.tensor([1.0, 1, 0, 1, 1, 0, 0, 0, 0]), torch.zeros(9)
    for masks in ([full, full, corner, corner, full, none, none, full], [corner, full, full, none, corner, corner]):
        channels = len(masks)
        weight = torch.randn(channels, 1, 3, 3) * torch.stack(masks).view(channels, 1, 3, 3)
        x = torch.randn(batch, channels, 6, 7).double().requires_grad_()
        dense = weight.double().requires_grad_()
        want = F.conv2d(x, dense, padding=1, groups=channels)
        grad = torch.randn(want.shape)
        want.backward(grad.double())
        pattern, values = ops.SparsePattern.build(weight, padding=(1, 1), groups=channels)
        geometry = (tuple(weight.shape), (1, 1), (1, 1, 1, 1), (1, 1), channels)
        source, sink = (native.to_layout(t.detach().float(), native.BATCH_LAST) for t in (x, grad))
        for got, wanted in (
            (native.conv2d(source, values, None, pattern.tensors, geometry), want.detach()),
            (native.conv2d_input_grad(sink, values, pattern.tensors, geometry, source.shape), x.grad),
            (native.conv2d_weight_grad(sink, source, pattern.tensors, geometry), pattern.from_dense(dense.grad)),
        ):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_missing_tap_reads_nothing(isa, dtype):
    """Lanes beyond the batch and columns beyond the image hold NaN here; none may leak in."""
    x = torch.full((5, 3, 6, 6), torch.nan, dtype=dtype)
    x[:, 1] = 1.0
    weight = torch.ones(3, 1, 3, 3)
    pattern, values = ops.SparsePattern.build(weight, padding=(1, 1), groups=3)
    geometry = (tuple(weight.shape), (1, 1), (1, 1, 1, 1), (1, 1), 3)
    source = native.to_layout(x, native.BATCH_LAST)
    y = native.conv2d(source, values, None, pattern.tensors, geometry)
    assert torch.equal(y[:, 1].float(), F.conv2d(torch.ones(5, 1, 6, 6), weight[:1], padding=1)[:, 0])
    sums = native.conv2d_weight_grad(source, source, pattern.tensors, geometry).view(3, 9)
    assert sums[1].isfinite().all() and sums[0].isnan().all()
