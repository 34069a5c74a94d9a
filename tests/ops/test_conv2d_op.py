import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, as_stored, assert_products, dense_conv2d, pattern_of, sparse_weight

from sparse_ft.ops import Activation, is_batch_last, native

STORAGES = ["contiguous", "channels_last", "batch_last", "strided", "transposed"]
# Whole vectors of every instruction set, whole tiles (48, 96, 192 samples), and one less and more than them.
BATCHES = st.one_of(
    st.sampled_from([1, 2, 4, 8, 15, 16, 17, 47, 48, 49, 95, 96, 97, 191, 192, 193, 256, 300]), st.integers(1, 300)
)


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, "depthwise"]))
    if groups == "depthwise":
        groups, in_per_group, out_per_group = draw(st.integers(2, 9)), 1, draw(st.integers(1, 2))
    else:
        in_per_group, out_per_group = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    kernel = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    stride = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = [draw(st.integers(0, 4)) for _ in range(4)]
    batch = draw(BATCHES)
    size = []
    for axis in range(2):
        reach = dilation[axis] * (kernel[axis] - 1) + 1 - padding[axis] - padding[axis + 2]
        spare = draw(st.integers(0, 12 if batch < 64 else 4))
        size.append(max(reach + spare, 1))
    return {
        "x": (batch, in_per_group * groups, *size),
        "weight": (out_per_group * groups, in_per_group, *kernel),
        "geometry": (stride, padding, dilation, groups),
        "density": draw(st.sampled_from([0.0, 0.02, 0.1, 0.4, 1.0])),
        "bias": draw(st.booleans()),
        "storage": (draw(st.sampled_from(STORAGES)), draw(st.sampled_from(STORAGES))),
        "threads": draw(st.sampled_from([1, 1, 1, 2, 3, 4])),
        "seed": draw(st.integers(0, 2**16)),
        "dtype": draw(st.sampled_from(DTYPES)),
    }


def _run(x, values, bias, pattern, weight_shape, geometry, grad):
    x, values = x.detach().requires_grad_(True), values.detach().requires_grad_(True)
    bias = None if bias is None else bias.detach().requires_grad_(True)
    y = torch.ops.sparse_ft.conv2d(x, values, bias, pattern.tensors, weight_shape, *geometry)
    assert is_batch_last(y)
    y.backward(grad)
    return y.detach(), x.grad, values.grad, None if bias is None else bias.grad


def check(case) -> None:
    torch.set_num_threads(case["threads"])
    generator = torch.Generator().manual_seed(case["seed"])
    stride, padding, dilation, groups = geometry = case["geometry"]
    weight = sparse_weight(case["weight"], case["density"], generator)
    pattern, values = pattern_of(weight, padding, stride=stride, dilation=dilation, groups=groups)
    x = torch.randn(case["x"], generator=generator).to(case["dtype"])
    bias = torch.randn(weight.shape[0], generator=generator) if case["bias"] else None
    with torch.no_grad():
        shape = dense_conv2d(x.float(), weight, None, *geometry).shape
        grad = torch.randn(shape, generator=generator).to(case["dtype"])
    args = (
        as_stored(x, case["storage"][0]), values, bias, pattern, weight.shape, geometry,
        as_stored(grad, case["storage"][1]),
    )  # fmt: skip
    y, grad_x, grad_values, grad_bias = first = _run(*args)
    # Gradients that leave the pattern cannot be compared with it: the dense ones are taken at its positions.
    got = [y, grad_x, pattern.to_dense(grad_values), *([] if bias is None else [grad_bias])]
    mask = pattern.mask()

    def product(x, weight, bias):
        return dense_conv2d(x, weight * mask, bias, *geometry)

    assert_products(got, product, grad, x, weight, bias)
    for one, other in zip(first, _run(*args), strict=True):  # the same to the last bit for the same thread count
        assert one is None or torch.equal(one, other)


@given(case=convolutions())
@settings(max_examples=60)
def test_against_float64(isa, case):
    check(case)


@pytest.mark.slow
@given(case=convolutions())
@settings(max_examples=3000, derandomize=False)
def test_against_float64_at_length(isa, case):
    check(case)


@pytest.mark.parametrize(
    ("x", "weight", "geometry", "density"),
    [
        # More channels than fit into one panel: the reduction is cut into blocks.
        ((96, 160, 6, 6), (24, 160, 3, 3), ((1, 1), (1, 1, 1, 1), (1, 1), 1), 0.3),
        ((33, 260, 5, 5), (20, 260, 1, 1), ((2, 2), (0, 0, 0, 0), (1, 1), 1), 0.3),
        # More groups than fit into one panel.
        ((64, 300, 8, 8), (300, 1, 5, 5), ((1, 1), (2, 2, 2, 2), (1, 1), 300), 0.2),
        # One tile for several threads: rows are shared out.
        ((16, 20, 1, 1), (130, 20, 1, 1), ((1, 1), (0, 0, 0, 0), (1, 1), 1), 0.3),
        # A kernel larger than the image, a stride larger than the kernel, a patch embedding.
        ((5, 4, 3, 3), (6, 4, 7, 7), ((1, 1), (3, 3, 3, 3), (1, 1), 1), 0.3),
        ((7, 6, 9, 9), (8, 6, 1, 1), ((4, 3), (0, 0, 0, 0), (1, 1), 1), 0.5),
        ((2, 3, 32, 32), (10, 3, 16, 16), ((16, 16), (0, 0, 0, 0), (1, 1), 1), 0.2),
        # A far reach.
        ((3, 4, 20, 20), (5, 4, 3, 3), ((1, 1), (18, 18, 18, 18), (18, 18), 1), 0.5),
    ],
)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_that_are_cut(isa, x, weight, geometry, density, threads, dtype):
    check(
        {
            "x": x, "weight": weight, "geometry": geometry, "density": density, "bias": True,
            "storage": ("contiguous", "batch_last"), "threads": threads, "seed": 0, "dtype": dtype,
        }
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_batch(isa, dtype):
    weight = sparse_weight((5, 4, 3, 3), 0.5, torch.Generator().manual_seed(0))
    pattern, values = pattern_of(weight)
    geometry = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    y, grad_x, grad_values, grad_bias = _run(
        torch.empty(0, 4, 8, 8, dtype=dtype),
        values,
        torch.ones(5),
        pattern,
        weight.shape,
        geometry,
        torch.empty(0, 5, 6, 6, dtype=dtype),
    )
    assert y.shape == (0, 5, 6, 6) and grad_x.shape == (0, 4, 8, 8)
    assert not grad_values.any() and not grad_bias.any()


def test_both_gradients_in_one_call_with_the_norm_of_the_source(isa):
    torch.manual_seed(0)
    weight = sparse_weight((6, 5, 3, 3), 0.5, torch.Generator().manual_seed(0))
    pattern, values = pattern_of(weight, (1, 1, 1, 1))
    geometry = (tuple(weight.shape), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    x, grad = (native.as_batch_last(torch.randn(17, channels, 7, 6)) for channels in (5, 6))
    norm = torch.rand(5) + 0.5, torch.randn(5), torch.randn(5), torch.rand(5) + 0.5, int(Activation.RELU)
    grad_x, grad_values = native.conv2d_backward(grad, x, values, pattern.tensors, geometry, norm)
    assert torch.equal(
        grad_x, torch.ops.sparse_ft.conv2d_input_grad(grad, values, pattern.tensors, *geometry, x.shape)
    )
    want = torch.ops.sparse_ft.norm_conv2d_weight_grad(grad, x, *norm, pattern.tensors, *geometry)
    assert grad_values.shape == values.shape and torch.equal(grad_values, want)


@pytest.mark.parametrize(
    "changed",
    [
        {"grad": torch.zeros(17, 6, 7, 5)},
        {"grad": torch.zeros(17, 6, 7, 6)},  # contiguous
        {"grad": torch.zeros(17, 6, 7, 6).double()},
        {"x": torch.zeros(17, 4, 7, 6)},
        {"x": torch.zeros(0, 5, 7, 6)},
        {"values": torch.zeros(3)},
        {"norm": (torch.ones(4), None, torch.zeros(5), torch.ones(5), 0)},
    ],
)
def test_what_one_call_does_not_take_it_leaves(changed):
    weight = sparse_weight((6, 5, 3, 3), 0.5, torch.Generator().manual_seed(0))
    pattern, values = pattern_of(weight, (1, 1, 1, 1))
    geometry = (tuple(weight.shape), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    x, grad = (native.as_batch_last(torch.zeros(17, channels, 7, 6)) for channels in (5, 6))
    given = {"grad": grad, "x": x, "values": values, "pattern": pattern.tensors, "geometry": geometry}
    assert native.conv2d_backward(**given) is not None
    assert native.conv2d_backward(**(given | changed)) is None


def test_only_the_gradients_that_are_asked_for():
    weight = sparse_weight((5, 4, 3, 3), 0.5, torch.Generator().manual_seed(0))
    pattern, values = pattern_of(weight)
    x = torch.randn(2, 4, 8, 8)
    y = torch.ops.sparse_ft.conv2d(
        x, values.requires_grad_(True), None, pattern.tensors, weight.shape, (1, 1), (0, 0, 0, 0), (1, 1), 1
    )
    y.sum().backward()
    assert values.grad is not None and x.grad is None
