from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, as_stored

from sparse_ft.ops import BATCH_LAST, CHANNELS_LAST, CONTIGUOUS, batch_last_strides, is_batch_last, layout_of

LAYOUTS = [CONTIGUOUS, CHANNELS_LAST, BATCH_LAST]
PAIRS = list(product(LAYOUTS, LAYOUTS))
SHAPES = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9), st.integers(1, 9))


def _numbered(shape, dtype):
    """Every value another, as far as the type has so many."""
    numbers = torch.arange(torch.Size(shape).numel())
    if dtype == torch.bfloat16:
        return (numbers % 0x7F80).to(torch.int16).view(dtype).view(shape)
    return numbers.to(dtype).view(shape)


@pytest.mark.parametrize(("have", "want"), PAIRS)
@given(shape=SHAPES, threads=st.sampled_from([1, 1, 2]), dtype=st.sampled_from(DTYPES))
@settings(max_examples=20)
def test_all_pairs(isa, have, want, shape, threads, dtype):
    torch.set_num_threads(threads)
    plain = _numbered(shape, dtype)
    x = torch.ops.sparse_ft.to_layout(plain, have)
    assert torch.equal(x, plain)
    y = torch.ops.sparse_ft.to_layout(x, want)
    assert torch.equal(y, plain)
    assert y.data_ptr() != x.data_ptr() or not plain.numel()  # a copy, never a view
    if plain.numel():
        assert {
            CONTIGUOUS: y.is_contiguous(),
            CHANNELS_LAST: y.is_contiguous(memory_format=torch.channels_last),
            BATCH_LAST: is_batch_last(y),
        }[want]


@pytest.mark.parametrize("want", LAYOUTS)
@pytest.mark.parametrize("storage", ["strided", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_strides_and_types(want, storage, dtype):
    plain = torch.randn(5, 4, 3, 6)
    x = as_stored(plain, storage).to(dtype)
    assert torch.equal(torch.ops.sparse_ft.to_layout(x, want), plain.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_and_thin(isa, dtype):
    """Rows beyond one strip of the transpose, and remainders of its blocks."""
    for shape in ((3, 2, 40, 41), (257, 3, 5, 7), (19, 600, 1, 1)):
        plain = torch.randn(shape).to(dtype)
        x = torch.ops.sparse_ft.to_layout(plain, BATCH_LAST)
        assert torch.equal(x, plain)
        assert torch.equal(torch.ops.sparse_ft.to_layout(x, CHANNELS_LAST), plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_sample_is_batch_last_where_it_is_contiguous(isa, dtype):
    plain = _numbered((1, 9, 5, 7), dtype)
    for have, want in PAIRS:
        x = torch.ops.sparse_ft.to_layout(plain, have)
        assert torch.equal(torch.ops.sparse_ft.to_layout(x, want), plain)


@pytest.mark.parametrize("shape", [(32, 64, 24, 24), (40, 70, 21, 19), (7, 300, 25, 25), (130, 96, 10, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_than_the_caches(isa, shape, dtype):
    """Staged in runs, and written around the caches."""
    shape = shape if dtype == torch.float32 else (shape[0], 2 * shape[1], *shape[2:])  # as many bytes
    plain = _numbered(shape, dtype)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for have, want in PAIRS:
            x = torch.ops.sparse_ft.to_layout(plain, have)
            assert torch.equal(x, plain)
            assert torch.equal(torch.ops.sparse_ft.to_layout(x, want), plain)


@pytest.mark.parametrize(("have", "want"), PAIRS)
def test_gradient_comes_in_the_layout_of_the_input(have, want):
    x = torch.ops.sparse_ft.to_layout(torch.randn(4, 3, 5, 6), have).requires_grad_(True)
    grad = torch.randn(4, 3, 5, 6)
    (got,) = torch.autograd.grad(torch.ops.sparse_ft.to_layout(x, want), x, grad)
    assert torch.equal(got, grad) and layout_of(got) == have


def test_layouts_are_told_apart():
    x = torch.randn(4, 3, 5, 6)
    assert layout_of(x) == CONTIGUOUS
    assert layout_of(x.contiguous(memory_format=torch.channels_last)) == CHANNELS_LAST
    batch_last = torch.empty_strided(x.shape, batch_last_strides(x.shape))
    assert layout_of(batch_last) == BATCH_LAST
    assert layout_of(batch_last.relu()) == BATCH_LAST  # elementwise operations keep it
    assert layout_of(batch_last + batch_last) == BATCH_LAST
    assert layout_of(x[:, :, ::2]) == CONTIGUOUS
    assert not is_batch_last(torch.randn(3, 4))
    assert is_batch_last(torch.randn(1, 3, 5, 6))  # one sample: the same places in memory
