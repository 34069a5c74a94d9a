import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_ft.masks.budgets import check_sparsity, erk, uniform

shapes = st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple), min_size=1, max_size=12)
sparsities = st.floats(0, 0.999)


@given(shapes, sparsities)
def test_erk_sum_is_exact_and_within_each_layer(shapes, sparsity):
    zeros = erk(shapes, sparsity)
    numels = [math.prod(shape) for shape in shapes]
    assert sum(zeros) == round(sum(numels) * sparsity)
    assert all(0 <= zero <= numel for zero, numel in zip(zeros, numels, strict=True))


@given(shapes, sparsities, sparsities)
def test_erk_gives_no_weights_back_when_the_sparsity_rises(shapes, first, second):
    low, high = sorted((first, second))
    assert all(fewer <= more for fewer, more in zip(erk(shapes, low), erk(shapes, high), strict=True))


@given(shapes, sparsities)
def test_erk_densities_are_proportional_below_the_cap(shapes, sparsity):
    zeros = erk(shapes, sparsity)
    kept = [math.prod(shape) - zero for shape, zero in zip(shapes, zeros, strict=True)]
    # nnz = scale * sum(shape) for one common scale, to within the rounding of one weight.
    lowest = max((k - 0.5) / sum(shape) for k, shape in zip(kept, shapes, strict=True))
    free = [(k, shape) for k, shape in zip(kept, shapes, strict=True) if k < math.prod(shape)]
    assert all((k + 0.5) / sum(shape) >= lowest - 1e-9 for k, shape in free)


def test_erk_by_hand():
    # 550 weights stay, in the proportion 20 : 110 of the sums of the dimensions.
    assert erk([(10, 10), (10, 100)], 0.5) == [15, 535]
    # 5,004 weights stay; 6/206 of them do not fit into the first layer, which stays dense.
    assert erk([(2, 4), (100, 100)], 0.5) == [0, 5004]


def test_erk_keeps_sparsity_zero_and_equal_layers_equal():
    assert erk([(4, 5), (6, 7)], 0.0) == [0, 0]
    assert erk([(8, 8), (8, 8)], 0.75) == [48, 48]
    assert erk([(8, 8), (8, 8)], 63 / 128) == [31, 32]  # the odd weight goes to the first layer


@given(st.integers(0, 10_000), sparsities, sparsities)
def test_uniform_is_the_rounded_count_and_rises_with_the_sparsity(numel, first, second):
    low, high = sorted((first, second))
    assert uniform(numel, low) == round(numel * low)
    assert uniform(numel, low) <= uniform(numel, high) <= numel


@pytest.mark.parametrize("value", [1.0, -0.1, 95, math.nan, math.inf, "0.9", None, True])
def test_sparsity_outside_the_range(value):
    with pytest.raises(ValueError, match="sparsity must be a number from 0 up to but not including 1, not"):
        check_sparsity(value)
