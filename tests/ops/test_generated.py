"""Generated kernels: shapes large enough for several tiles, chunks of code, blocks of rows and of channels."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from oracle import DTYPES, ROUNDING

from sparse_ft import ops
from sparse_ft.ops import native
from sparse_ft.ops.statistics import Moments

pytestmark = pytest.mark.skipif(
    "avx512-jit" not in ops.available_isas(), reason="this processor or system runs no generated code"
)


@pytest.fixture(autouse=True)
def generated():
    isa, threads = ops.active_isa(), torch.get_num_threads()
    ops.activate_isa("avx512-jit")
    yield
    ops.activate_isa(isa)
    torch.set_num_threads(threads)


def _sparse(shape: tuple[int, ...], density: float) -> torch.Tensor:
    return torch.randn(shape) * (torch.rand(shape) < density)


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    rtol = 1e-4 + ROUNDING[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-5 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "features", "outputs", "density"),
    [
        (64, 40, 50, 0.3),
        (130, 768, 300, 0.1),  # a short last tile
        (1000, 30, 1100, 0.05),  # rows in several bands
        (200, 4000, 90, 0.1),  # a reduction in blocks of channels
        (96, 2500, 150, 0.9),  # several chunks of code for the same rows
        (333, 128, 129, 0.02),  # empty rows
    ],
)
def test_linear(tokens, features, outputs, density, threads, dtype):
    torch.manual_seed(tokens)
    torch.set_num_threads(threads)
    weight, bias = _sparse((outputs, features), density), torch.randn(outputs)
    x, grad = torch.randn(tokens, features).to(dtype), torch.randn(tokens, outputs).to(dtype)
    pattern, values = ops.SparsePattern.build(weight)
    for use_bias in (bias, None):
        got = native.linear(x, values, use_bias, pattern.tensors, features, outputs)
        _close(got, F.linear(x.double(), weight.double(), None if use_bias is None else bias.double()))
    got = native.linear_input_grad(grad, values, pattern.tensors, features, outputs)
    _close(got, grad.double() @ weight.double())
    alone = native.linear_weight_grad(grad, x, pattern.tensors, features, outputs)
    beside, bias_grad = native.linear_weight_grad(grad, x, pattern.tensors, features, outputs, of_bias=True)
    for got in (alone, beside):
        _close(got, pattern.from_dense(grad.double().T @ x.double()))
    _close(bias_grad, grad.double().sum(0))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "size", "kernel", "stride", "padding", "dilation", "groups", "density"),
    [
        (16, 40, 60, (12, 9), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.2),
        (32, 32, 32, (17, 17), (3, 3), (2, 2), (1, 1), (1, 1), 1, 0.2),
        # Several vectors of samples, each at all positions of a row in turn: whole rows, parts, blocks of channels.
        (64, 32, 60, (9, 10), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.2),
        (32, 24, 40, (8, 3), (3, 3), (1, 1), (0, 1), (1, 1), 1, 0.2),
        (80, 40, 33, (11, 12), (3, 3), (2, 2), (1, 1), (1, 1), 1, 0.2),
        (48, 600, 40, (6, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.05),
        (32, 64, 96, (20, 20), (1, 1), (1, 1), (0, 0), (1, 1), 1, 0.1),
        (20, 24, 24, (11, 13), (3, 5), (1, 2), (0, 2), (2, 1), 1, 0.3),  # a batch that fills no whole vectors
        (5, 32, 48, (9, 10), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.2),
        (1, 64, 64, (30, 31), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.1),
        # Tiles of some of the samples, for a smaller halo: halves, quarters, the last of them short.
        (64, 64, 40, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.1),
        (128, 64, 30, (8, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.1),
        (260, 48, 30, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.1),
        (300, 16, 16, (5, 4), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.3),  # more samples than a tile holds
        (16, 600, 40, (7, 7), (3, 3), (1, 1), (1, 1), (1, 1), 1, 0.05),  # blocks of channels
        (16, 64, 96, (8, 8), (3, 3), (1, 1), (1, 1), (1, 1), 4, 0.3),
        (16, 80, 64, (9, 9), (1, 1), (3, 3), (0, 0), (1, 1), 2, 0.2),  # phases of the stride without taps
        # Results that bypass the caches: of the forward pass, of the input gradient, of phases that are cleared.
        (64, 20, 48, (24, 24), (1, 1), (1, 1), (0, 0), (1, 1), 1, 0.1),
        (64, 256, 20, (24, 24), (1, 1), (1, 1), (0, 0), (1, 1), 1, 0.05),
        (32, 64, 96, (26, 26), (1, 1), (2, 2), (0, 0), (1, 1), 1, 0.1),
        (36, 64, 96, (26, 26), (1, 1), (2, 2), (0, 0), (1, 1), 1, 0.1),
        (36, 64, 40, (26, 26), (1, 3), (2, 1), (0, 1), (1, 1), 1, 0.1),
        # Sources that are read where they lie: a short last tile, groups.
        (16, 24, 40, (105, 105), (1, 1), (1, 1), (0, 0), (1, 1), 1, 0.2),
        (16, 48, 64, (75, 76), (1, 1), (1, 1), (0, 0), (1, 1), 2, 0.1),
    ],
)
def test_conv2d(batch, channels, outputs, size, kernel, stride, padding, dilation, groups, density, threads, dtype):
    torch.manual_seed(batch + channels)
    torch.set_num_threads(threads)
    weight, bias = _sparse((outputs, channels // groups, *kernel), density), torch.randn(outputs)
    x = torch.randn(batch, channels, *size).to(dtype).double().requires_grad_()
    dense = weight.double().requires_grad_()
    want = F.conv2d(x, dense, bias.double(), stride, padding, dilation, groups)
    grad = torch.randn(want.shape).to(dtype)
    want.backward(grad.double())
    geometry = (tuple(weight.shape), stride, (*padding, *padding), dilation, groups)
    pattern, values = ops.SparsePattern.build(weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    source = native.to_layout(x.detach().to(dtype), native.BATCH_LAST)
    sink = native.to_layout(grad, native.BATCH_LAST)
    for use_bias in (bias, None):
        got = native.conv2d(source, values, use_bias, pattern.tensors, geometry)
        _close(got, want.detach() - (0 if use_bias is not None else bias.double().view(-1, 1, 1)))
    got = native.conv2d_input_grad(sink, values, pattern.tensors, geometry, source.shape)
    _close(got, x.grad)
    got = native.conv2d_weight_grad(sink, source, pattern.tensors, geometry)
    _close(got, pattern.from_dense(dense.grad))
    grad_x, grad_values = native.conv2d_backward(sink, source, values.view(-1, 1), pattern.tensors, geometry)
    assert torch.equal(grad_x, native.conv2d_input_grad(sink, values, pattern.tensors, geometry, source.shape))
    assert grad_values.shape == (pattern.nnz, 1) and torch.equal(grad_values.flatten(), got)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_moments_of_results_whose_source_is_read_where_it_lies(threads):
    torch.manual_seed(threads)
    torch.set_num_threads(threads)
    weight = _sparse((60, 24, 1, 1), 0.3)
    weight[20:40] = 0  # the second of three chunks of rows: no nonzero
    pattern, values = ops.SparsePattern.build(weight)
    x = native.to_layout(torch.randn(16, 24, 110, 100), native.BATCH_LAST)
    geometry = ((60, 24, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    moments = Moments()
    y = native.conv2d(x, values, None, pattern.tensors, geometry, moments=moments)
    _close(y, F.conv2d(x.double(), weight.double()))
    variance, mean = torch.var_mean(y.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(moments.mean.double(), mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(moments.variance.double(), variance, rtol=1e-5, atol=0)


def test_the_result_depends_on_the_thread_count_alone():
    torch.manual_seed(0)
    torch.set_num_threads(3)
    weight, x, grad = _sparse((200, 300), 0.1), torch.randn(700, 300), torch.randn(700, 200)
    pattern, values = ops.SparsePattern.build(weight)
    first, again = (native.linear_weight_grad(grad, x, pattern.tensors, 300, 200) for _ in range(2))
    assert torch.equal(first, again)


def _product(pattern, values, x):
    return native.linear(x, values, None, pattern.tensors, 64, 32)


def test_code_is_kept_where_the_same_numbers_are_written():
    pattern, values = ops.SparsePattern.build(_sparse((32, 64), 0.2))
    before = native.programs(pattern.tensors)
    pattern.col.copy_(pattern.col.clone())  # as a broadcast of buffers does
    assert native.programs(pattern.tensors) is before


def test_code_follows_a_pattern_that_is_changed_in_place():
    torch.manual_seed(1)
    x = torch.randn(64, 64)
    pattern, values = ops.SparsePattern.build(torch.eye(32, 64))
    _close(_product(pattern, values, x), x[:, :32].double())
    pattern.col += 32
    _close(_product(pattern, values, x), x[:, 32:].double())


def test_code_dies_with_its_pattern():
    pattern, values = ops.SparsePattern.build(_sparse((32, 64), 0.2))
    _product(pattern, values, torch.randn(128, 64))
    programs = weakref.ref(native.programs(pattern.tensors))
    assert programs() is not None
    del pattern
    gc.collect()
    assert programs() is None


def test_a_malformed_pattern_is_refused_each_time():
    pattern, values = ops.SparsePattern.build(_sparse((32, 64), 0.2))
    pattern.col[5] = 1000
    for _ in range(2):
        with pytest.raises(ValueError, match="column indices"):
            _product(pattern, values, torch.randn(128, 64))
