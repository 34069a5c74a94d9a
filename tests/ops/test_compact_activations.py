import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import RELATIVE, dense_conv2d, expected

from sparse_ft.ops import BATCH_LAST, is_batch_last
from sparse_ft.ops.compact import compact, largest_mask, nth_magnitude, weight_grad

# Whole bytes of samples and one less and more, and more blocks than are packed together.
BATCHES = st.one_of(st.sampled_from([1, 7, 8, 9, 16, 31, 32, 33, 64, 71]), st.integers(1, 80))


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    in_per_group = draw(st.integers(1, 7))
    out_per_group = draw(st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 33, 64, 70])))
    kernel = (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    stride = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = tuple(draw(st.integers(0, 4)) for _ in range(4))
    size = []
    for axis in range(2):
        reach = dilation[axis] * (kernel[axis] - 1) + 1 - padding[axis] - padding[axis + 2]
        size.append(max(reach + draw(st.integers(0, 20)), 1))
    return {
        "x": (draw(BATCHES), in_per_group * groups, *size),
        "weight": (out_per_group * groups, in_per_group, *kernel),
        "geometry": (stride, padding, dilation, groups),
        "density": draw(st.sampled_from([0.0, 0.02, 0.2, 0.6, 1.0])),
        "threads": draw(st.sampled_from([1, 1, 2, 3, 5])),
    }


def case(x, weight, stride=(1, 1), padding=(0, 0, 0, 0), dilation=(1, 1), groups=1, density=0.2, threads=1):
    return {
        "x": x, "weight": weight, "geometry": (stride, padding, dilation, groups), "density": density,
        "threads": threads,
    }  # fmt: skip


def random_image(shape, generator):
    return torch.ops.sparse_ft.to_layout(torch.randn(shape, generator=generator), BATCH_LAST)


def threshold_for(x, density):
    """A magnitude that about that share of a normal distribution is above."""
    return math.inf if density == 0 else 0.0 if density == 1 else float(x.abs().flatten().quantile(1 - density))


@settings(max_examples=60)
@given(convolutions())
@example(case((32, 20, 30, 30), (70, 20, 3, 3), padding=(1, 1, 1, 1)))  # several tiles each way
@example(
    case((16, 3, 40, 41), (16, 3, 7, 7), stride=(2, 2), padding=(3, 3, 3, 3), threads=2)
)  # more taps than registers
@example(case((8, 5, 1, 1), (9, 5, 3, 3), padding=(1, 1, 1, 1)))  # eight of nine taps read zeros only
@example(case((9, 130, 33, 17), (24, 130, 1, 1), threads=3))  # positions as samples, over several blocks
@example(case((5000, 6, 1, 1), (33, 6, 1, 1), density=0.6))
def test_weight_gradient_is_that_of_what_was_kept(isa, drawn):
    stride, padding, dilation, groups = drawn["geometry"]
    generator = torch.Generator().manual_seed(len(str(drawn)))
    x = random_image(drawn["x"], generator)
    weight = torch.zeros(drawn["weight"])
    flat = weight.shape[2:] == (1, 1) and stride == (1, 1) and not any(padding)
    threshold = threshold_for(x, drawn["density"])
    torch.set_num_threads(drawn["threads"])
    kept = compact(x, threshold, flat=flat, column_step=stride[1])
    sparse = torch.where(x.abs() > threshold, x, 0.0)
    assert torch.equal(kept.to_dense(), sparse) and is_batch_last(kept.to_dense())
    assert kept.values.numel() == int(torch.count_nonzero(sparse))

    def product(x, weight):
        return dense_conv2d(x, weight, None, stride, padding, dilation, groups)

    grad = random_image(product(x, weight).shape, generator)
    got, count = weight_grad(kept, grad, weight.shape, stride, padding, dilation, groups)
    want = expected(product, grad, sparse, weight)[2]
    size = expected(product, grad.abs(), sparse.abs(), weight)[2]
    excess = (got.double() - want).abs() - RELATIVE * size
    assert excess.max() <= 1e-30
    assert count <= kept.values.numel() * weight.shape[0] // groups * weight.shape[2] * weight.shape[3]


def test_multiply_adds_are_those_of_kept_values(isa):
    x = random_image((8, 4, 6, 6), torch.Generator().manual_seed(0))
    kept = compact(x, 1.0, flat=False)
    _, count = weight_grad(kept, x[:, :1].expand(8, 10, 6, 6).contiguous().permute(1, 2, 3, 0).contiguous().permute(
        3, 0, 1, 2
    ), (10, 4, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)  # fmt: skip
    assert count == kept.values.numel() * 9 * 10


def test_size_is_a_bit_a_place_and_four_bytes_a_value():
    x = random_image((32, 16, 14, 14), torch.Generator().manual_seed(0))
    kept = compact(x, nth_magnitude(x, x.numel() // 10), flat=False)
    assert kept.values.numel() == x.numel() // 10
    assert kept.nbytes <= x.numel() / 8 + 4 * kept.values.numel() + 8 * (4 * 16 + 1)


def test_not_a_number_is_kept(isa):
    x = random_image((8, 3, 4, 4), torch.Generator().manual_seed(0))
    x[3, 1, 2, 2] = torch.nan
    kept = compact(x, 2.0, flat=False)
    grad, _ = weight_grad(kept, torch.ones_like(x), (3, 3, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    assert grad[:, 1].isnan().all() and grad[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 1000, 4097])
def test_nth_magnitude_is_exact(count, threads):
    torch.set_num_threads(threads)
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    x[::3] = 0
    ordered = x.abs().sort(descending=True).values
    for n in {0, count // 2, count - 1}:
        assert nth_magnitude(x, n) == ordered[n]
        assert nth_magnitude(x.double(), n) == ordered[n]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_among_equal_values_the_first_are_kept(dtype):
    x = torch.tensor([[1.0, -2.0, 2.0], [-1.0, 3.0, 1.0]], dtype=dtype)
    assert largest_mask(x, 4).tolist() == [[True, True, True], [False, True, False]]
    assert largest_mask(x, 0).sum() == 0 and largest_mask(x, 6).all()


def test_a_gradient_of_another_shape_is_refused():
    x = random_image((8, 4, 6, 6), torch.Generator().manual_seed(0))
    kept = compact(x, 1.0, flat=False)
    with pytest.raises(ValueError, match="must be batch-last float32 of shape"):
        weight_grad(kept, x, (4, 4, 3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1)
    with pytest.raises(ValueError, match="kept for a stride of 1, not 2"):
        weight_grad(kept, random_image((8, 4, 3, 3), torch.Generator()), (4, 4, 1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1)
    with pytest.raises(ValueError, match="batch-last float32"):
        compact(x.contiguous(), 1.0, flat=False)
