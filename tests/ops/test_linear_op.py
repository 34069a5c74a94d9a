import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, as_stored, assert_products, pattern_of, sparse_weight


@st.composite
def layers(draw):
    leading = draw(
        st.one_of(
            st.tuples(), st.tuples(st.integers(1, 300)), st.tuples(st.integers(1, 20), st.integers(1, 20)),
            st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)),
        )
    )  # fmt: skip
    return {
        "leading": leading,
        "weight": (draw(st.integers(1, 70)), draw(st.integers(1, 70))),
        "density": draw(st.sampled_from([0.0, 0.02, 0.1, 0.5, 1.0])),
        "bias": draw(st.booleans()),
        "storage": [draw(st.sampled_from(["contiguous", "strided", "transposed"])) for _ in range(2)],
        "threads": draw(st.sampled_from([1, 1, 1, 2, 3, 4])),
        "seed": draw(st.integers(0, 2**16)),
        "dtype": draw(st.sampled_from(DTYPES)),
    }


def _run(x, values, bias, pattern, shape, grad):
    x, values = x.detach().requires_grad_(True), values.detach().requires_grad_(True)
    bias = None if bias is None else bias.detach().requires_grad_(True)
    y = torch.ops.sparse_ft.linear(x, values, bias, pattern.tensors, shape[1], shape[0])
    y.backward(grad)
    return y.detach(), x.grad, values.grad, None if bias is None else bias.grad


def check(case) -> None:
    torch.set_num_threads(case["threads"])
    generator = torch.Generator().manual_seed(case["seed"])
    weight = sparse_weight(case["weight"], case["density"], generator)
    pattern, values = pattern_of(weight)
    values = values.view(-1, 1)
    x = torch.randn(*case["leading"], weight.shape[1], generator=generator).to(case["dtype"])
    bias = torch.randn(weight.shape[0], generator=generator) if case["bias"] else None
    grad = torch.randn(*case["leading"], weight.shape[0], generator=generator).to(case["dtype"])
    args = (
        as_stored(x, case["storage"][0]), values, bias, pattern, weight.shape, as_stored(grad, case["storage"][1])
    )  # fmt: skip
    y, grad_x, grad_values, grad_bias = first = _run(*args)
    assert grad_values.shape == values.shape
    got = [y, grad_x, pattern.to_dense(grad_values), *([] if bias is None else [grad_bias])]
    mask = pattern.mask()
    assert_products(got, lambda x, weight, bias: F.linear(x, weight * mask, bias), grad, x, weight, bias)
    for one, other in zip(first, _run(*args), strict=True):
        assert one is None or torch.equal(one, other)


@given(case=layers())
@settings(max_examples=60)
def test_against_float64(isa, case):
    check(case)


@pytest.mark.slow
@given(case=layers())
@settings(max_examples=3000, derandomize=False)
def test_against_float64_at_length(isa, case):
    check(case)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "weight", "density"),
    [(300, (90, 1100), 0.1), (193, (1100, 90), 0.1), (1, (300, 500), 0.1), (17, (16, 3000), 0.05)],
)
def test_shapes_that_are_cut(isa, tokens, weight, density, threads, dtype):
    check(
        {
            "leading": (tokens,), "weight": weight, "density": density, "bias": True,
            "storage": ["contiguous", "contiguous"], "threads": threads, "seed": 1, "dtype": dtype,
        }
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 4)])
def test_zero_tokens(leading, dtype):
    weight = sparse_weight((6, 5), 0.5, torch.Generator().manual_seed(0))
    pattern, values = pattern_of(weight)
    y, grad_x, grad_values, grad_bias = _run(
        torch.empty(*leading, 5, dtype=dtype),
        values,
        torch.ones(6),
        pattern,
        weight.shape,
        torch.empty(*leading, 6, dtype=dtype),
    )
    assert y.shape == (*leading, 6) and grad_x.shape == (*leading, 5)
    assert not grad_values.any() and not grad_bias.any()


@pytest.mark.parametrize("shape", [(6, 0), (0, 6), (0, 0)])
def test_zero_features(shape):
    pattern, values = pattern_of(torch.empty(shape))
    bias = torch.arange(float(shape[0]))
    y, grad_x, grad_values, grad_bias = _run(
        torch.empty(4, shape[1]), values, bias, pattern, shape, torch.ones(4, shape[0])
    )
    assert torch.equal(y, bias.expand(4, -1))
    assert torch.equal(grad_x, torch.zeros(4, shape[1])) and grad_values.numel() == 0
    assert torch.equal(grad_bias, torch.full_like(bias, 4.0))
