"""Patterns by a threshold are those of the mask of the same weights."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_ft.ops import SparsePattern
from sparse_ft.ops.pattern import flat_index
from sparse_ft.ops.thresholds import count_at_least, pattern_at_least


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    channels=st.integers(1, 30),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.sampled_from([1, 1, 2]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    threads=st.sampled_from([1, 1, 3]),
    seed=st.integers(0, 99),
)
@example(33, 64, (3, 3), (1, 1), 1, 1.0, 3, 0)
@example(3, 5, (1, 1), (1, 1), 1, 0.5, 1, 1)
def test_the_pattern_is_that_of_the_mask(isa, rows, channels, kernel, stride, groups, density, threads, seed):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows * groups, channels, *kernel, generator=generator)
    weight.view(-1)[::5] = 0.0
    threshold = 0.0 if density == 1 else float("inf") if density == 0 else float(weight.abs().quantile(1 - density))
    taps = torch.randint(2, (kernel[0] * kernel[1],), generator=generator, dtype=torch.uint8)
    geometry = {"stride": stride, "padding": (1, 0), "dilation": (1, 2), "groups": groups}
    for chosen in (None, taps):
        mask = (weight.abs() >= threshold) & (weight != 0)
        assert count_at_least(weight, threshold) == int(mask.sum())
        assert count_at_least(weight.double(), threshold) == int(mask.sum())
        if chosen is not None:
            mask &= chosen.bool().view(kernel)
        want, values = SparsePattern.build(weight, mask, **geometry)
        got, found = pattern_at_least(weight, threshold, **geometry, taps=chosen)
        assert all(torch.equal(a, b) for a, b in zip(got, want.tensors, strict=True))
        assert torch.equal(found, values)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_in_use(isa, value):
    weight = torch.zeros(20, 20, 1, 1)
    weight[3, 4] = value
    pattern, values = pattern_at_least(weight, 1e9, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
    assert (
        flat_index(*pattern[:2], weight.shape).tolist() == [64]
        and torch.equal(values, torch.tensor([value])) != values.isnan().all()
    )


def test_zero_is_never_in_use(isa):
    weight = torch.zeros(20, 20, 1, 1)
    weight[7, 9] = 1e-42  # not normal, and not zero
    pattern, _ = pattern_at_least(weight, 0.0, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
    assert flat_index(*pattern[:2], weight.shape).tolist() == [149]
