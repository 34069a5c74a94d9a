"""Whatever the operators are given, they answer or raise ValueError: never a crash, never memory of others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import pattern_of, sparse_weight

GEOMETRY = ((2, 2), (1, 1, 1, 1), (1, 1), 2)
SHAPE = (6, 4, 3, 3)
ROW_PTR, COL, T_ROW_PTR, T_COL, PERM = range(5)


def _pattern():
    weight = sparse_weight(SHAPE, 0.5, torch.Generator().manual_seed(0))
    pattern, values = pattern_of(weight, (1, 1, 1, 1), stride=(2, 2), groups=2)
    return [tensor.clone() for tensor in pattern.tensors], values


def _forward(pattern, values, x=None, bias=None, shape=SHAPE, geometry=GEOMETRY):
    return torch.ops.sparse_ft.conv2d(
        torch.randn(3, 8, 7, 7) if x is None else x, values, bias, pattern, shape, *geometry
    )


def _input_grad(pattern, values, grad=None, input_shape=(3, 8, 7, 7), shape=SHAPE, geometry=GEOMETRY):
    grad = torch.randn(3, 6, 4, 4) if grad is None else grad
    return torch.ops.sparse_ft.conv2d_input_grad(grad, values, pattern, shape, *geometry, list(input_shape))


def _weight_grad(pattern, grad=None, x=None, shape=SHAPE, geometry=GEOMETRY):
    return torch.ops.sparse_ft.conv2d_weight_grad(
        torch.randn(3, 6, 4, 4) if grad is None else grad, torch.randn(3, 8, 7, 7) if x is None else x, pattern,
        shape, *geometry,
    )  # fmt: skip


CORRUPTIONS = {
    "column beyond the row": (COL, -1, 36),
    "column far beyond the row": (COL, 5, 2**31 - 1),
    "negative column": (COL, 0, -1),
    "descending columns": (COL, 1, 0),
    "row pointer not ascending": (ROW_PTR, 1, 100000),
    "negative row pointer": (ROW_PTR, 3, -5),
    "row pointers begin late": (ROW_PTR, 0, 1),
    "row pointers end early": (ROW_PTR, -1, 3),
    "transposed column beyond the row": (T_COL, -1, 27),
    "negative transposed column": (T_COL, 0, -1),
    "transposed column of another stride phase": (T_COL, 0, 5),
    "transposed row pointer not ascending": (T_ROW_PTR, 2, 2**31 - 1),
    "transposed row pointers begin late": (T_ROW_PTR, 0, 1),
    "transposed row pointers end early": (T_ROW_PTR, -1, 3),
    "permutation out of range": (PERM, 4, 10000),
    "negative permutation": (PERM, 4, -1),
}


@pytest.mark.parametrize("case", CORRUPTIONS)
@pytest.mark.parametrize("threads", [1, 3])
def test_corrupt_index(isa, case, threads):
    torch.set_num_threads(threads)
    pattern, values = _pattern()
    which, place, value = CORRUPTIONS[case]
    pattern[which][place] = value
    with pytest.raises(ValueError, match="malformed sparse pattern"):
        if which in (ROW_PTR, COL):
            _forward(pattern, values)
        else:
            _input_grad(pattern, values)
    if which in (ROW_PTR, COL):
        with pytest.raises(ValueError, match="malformed sparse pattern"):
            _weight_grad(pattern)


INT32 = st.one_of(st.integers(-3, 120), st.integers(-(2**31), 2**31 - 1))


@given(changes=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2**16), INT32), min_size=1, max_size=4))
@settings(max_examples=150)
def test_any_corruption(isa, changes):
    pattern, values = _pattern()
    for which, place, value in changes:
        pattern[which][place % pattern[which].numel()] = value
    for product in (
        lambda: _forward(pattern, values),
        lambda: _input_grad(pattern, values),
        lambda: _weight_grad(pattern),
    ):
        try:
            product()
        except ValueError as error:
            assert "malformed sparse pattern" in str(error)


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize(
    "change",
    [lambda t: t.long(), lambda t: t[:-1], lambda t: torch.cat([t, t[-1:]]), lambda t: t.float(),
     lambda t: torch.stack([t, t], 1)[:, 0]],
    ids=["int64", "short", "long", "float", "strided"],
)  # fmt: skip
def test_index_of_another_size_or_type(which, change):
    pattern, values = _pattern()
    pattern[which] = change(pattern[which])
    for product in (lambda: _forward(pattern, values), lambda: _input_grad(pattern, values)):
        with pytest.raises(ValueError, match="malformed sparse pattern"):
            product()


def test_other_arguments_that_do_not_fit():
    pattern, values = _pattern()
    for call in (
        lambda: _forward([], values),
        lambda: _forward(pattern[:4], values),
        lambda: _forward(pattern, values[:-1]),
        lambda: _forward(pattern, values, bias=torch.zeros(5)),
        lambda: _forward(pattern, values, x=torch.randn(3, 7, 7, 7)),
        lambda: _forward(pattern, values, x=torch.randn(8, 7, 7)),
        lambda: _forward(pattern, values, x=torch.randn(3, 8, 0, 7), geometry=((2, 2), (0, 0, 0, 0), (1, 1), 2)),
        lambda: _forward(pattern, values, shape=(6, 4, 3)),
        lambda: _forward(pattern, values, shape=(6, 4, -3, 3)),
        lambda: _forward(pattern, values, shape=(6, 4, 0, 3)),
        lambda: _forward(pattern, values, geometry=((0, 2), (1, 1, 1, 1), (1, 1), 2)),
        lambda: _forward(pattern, values, geometry=((2, 2), (1, 1), (1, 1), 2)),
        lambda: _forward(pattern, values, geometry=((2, 2), (1, 1, 1, -1), (1, 1), 2)),
        lambda: _forward(pattern, values, geometry=((2, 2), (1, 1, 1, 1), (0, 1), 2)),
        lambda: _forward(pattern, values, geometry=((2, 2), (1, 1, 1, 1), (1, 1), 0)),
        lambda: _forward(pattern, values, geometry=((2, 2), (1, 1, 1, 1), (1, 1), 4), x=torch.randn(3, 16, 7, 7)),
        lambda: _input_grad(pattern, values, grad=torch.randn(3, 6, 5, 4)),
        lambda: _input_grad(pattern, values, grad=torch.randn(2, 6, 4, 4)),
        lambda: _input_grad(pattern, values, input_shape=(3, 7, 7, 7)),
        lambda: _input_grad(pattern, values, input_shape=(3, 8, 70, 7)),
        lambda: _input_grad(pattern, values, input_shape=(3, 8, 7)),
        lambda: _weight_grad(pattern, grad=torch.randn(3, 5, 4, 4)),
        lambda: _weight_grad(pattern, x=torch.randn(2, 8, 7, 7)),
    ):
        with pytest.raises(ValueError):
            call()


def test_a_reach_beyond_memory():
    """Valid numbers, whose tile would take terabytes."""
    geometry = {"stride": (1, 1), "dilation": (400_000, 400_000)}
    pattern, values = pattern_of(torch.ones(1, 1, 2, 2), (200_000,) * 4, **geometry)
    with pytest.raises(ValueError, match="too large"):
        torch.ops.sparse_ft.conv2d(
            torch.randn(2, 1, 1, 1), values, None, pattern.tensors, (1, 1, 2, 2), (1, 1), (200_000,) * 4,
            (400_000, 400_000), 1,
        )  # fmt: skip
    with pytest.raises(ValueError, match="out of range"):
        pattern_of(torch.ones(1, 1, 2, 2), dilation=(2**21, 1))


def test_linear():
    pattern, values = pattern_of(sparse_weight((6, 5), 0.5, torch.Generator().manual_seed(0)))
    index, ops = pattern.tensors, torch.ops.sparse_ft
    corrupt = [tensor.clone() for tensor in index]
    corrupt[COL][0] = 5
    corrupt[PERM][0] = -1
    x, grad = torch.randn(7, 5), torch.randn(7, 6)
    for call in (
        lambda: ops.linear(x, values, None, corrupt, 5, 6),
        lambda: ops.linear_input_grad(grad, values, corrupt, 5, 6),
        lambda: ops.linear_weight_grad(grad, x, corrupt, 5, 6),
        lambda: ops.linear(grad, values, None, index, 5, 6),
        lambda: ops.linear(torch.tensor(1.0), values, None, index, 5, 6),
        lambda: ops.linear(x, values, torch.zeros(7), index, 5, 6),
        lambda: ops.linear(x, values, None, index, 5, 7),
        lambda: ops.linear_input_grad(x, values, index, 5, 6),
        lambda: ops.linear_weight_grad(torch.randn(8, 6), x, index, 5, 6),
        lambda: ops.linear_weight_grad(grad, torch.randn(7, 6), index, 5, 6),
    ):
        with pytest.raises(ValueError):
            call()


def test_batch_norm_and_layout():
    ops, x, three = torch.ops.sparse_ft, torch.randn(2, 3, 4, 5), torch.ones(3)
    for call in (
        lambda: ops.batch_norm(x, torch.ones(2), None, None, None, 1e-5),
        lambda: ops.batch_norm(x, None, torch.ones(4), None, None, 1e-5),
        lambda: ops.batch_norm(x, None, None, three, None, 1e-5),
        lambda: ops.batch_norm(x, None, None, torch.ones(2), three, 1e-5),
        lambda: ops.batch_norm(x[0], None, None, None, None, 1e-5),
        lambda: ops.batch_norm_backward(x[:1], x, None, None, three, three, None, None, 0, True),
        lambda: ops.batch_norm_backward(x, x, None, None, torch.ones(1), three, None, None, 0, True),
        lambda: ops.to_layout(x, 3),
        lambda: ops.to_layout(x[0], 1),
    ):
        with pytest.raises(ValueError):
            call()


def test_vectors_with_strides():
    """Bias, norm weight and values as columns of a matrix: right answers, not the neighbours' numbers."""
    weight = sparse_weight((6, 5), 0.5, torch.Generator().manual_seed(0))
    pattern, values = pattern_of(weight)
    columns = torch.randn(6, 2)
    x = torch.randn(3, 5)
    got = torch.ops.sparse_ft.linear(x, torch.stack([values, values], 1)[:, 1], columns[:, 0], pattern.tensors, 5, 6)
    torch.testing.assert_close(got, x @ weight.t() + columns[:, 0])
    x = torch.randn(2, 6, 4, 4)
    one, two = (
        torch.ops.sparse_ft.batch_norm(x, w, w, w, w.abs(), 1e-5)[0]
        for w in (columns[:, 1], columns[:, 1].contiguous())
    )
    assert torch.equal(one, two)
