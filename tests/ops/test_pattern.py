import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import sparse_weight

from sparse_ft.ops import SparsePattern, native
from sparse_ft.tune import interleaved_medians


@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 40), st.integers(0, 40)),
        st.tuples(st.integers(1, 12), st.integers(1, 8), st.integers(1, 5), st.integers(1, 5)),
    ),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100)
def test_rows_are_torch_csr(shape, density, threads, seed):
    torch.set_num_threads(threads)
    weight = sparse_weight(shape, density, torch.Generator().manual_seed(seed))
    pattern, values = SparsePattern.build(weight)
    csr = weight.reshape(shape[0], weight[0].numel() if shape[0] else 0).to_sparse_csr()
    assert torch.equal(pattern.row_ptr.long(), csr.crow_indices())
    assert torch.equal(pattern.col.long(), csr.col_indices())
    assert torch.equal(values, csr.values())
    assert torch.equal(pattern.to_dense(values), weight)
    assert torch.equal(pattern.from_dense(weight), values)
    assert torch.equal(pattern.mask(), weight != 0)
    assert torch.equal(pattern.flat_index(), weight.reshape(-1).nonzero().flatten())
    assert pattern.nnz == values.numel()


@given(
    groups=st.integers(1, 4),
    per_group=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=100)
def test_transposed_rows(groups, per_group, kernel, stride, padding, dilation, seed):
    """Every entry once, in the row of its stride phase and input channel, in ascending order."""
    out_per_group, in_per_group = per_group
    shape = (groups * out_per_group, in_per_group, *kernel)
    weight = sparse_weight(shape, 0.5, torch.Generator().manual_seed(seed))
    pattern, _ = SparsePattern.build(weight, stride=stride, padding=padding, dilation=dilation, groups=groups)
    taps, channels = kernel[0] * kernel[1], in_per_group * groups
    entries: dict[int, list[tuple[int, int]]] = {}
    for j, (o, i, ky, kx) in enumerate(weight.nonzero().tolist()):
        phase_y = (ky * dilation[0] - padding[0]) % stride[0]
        phase_x = (kx * dilation[1] - padding[1]) % stride[1]
        channel = o // out_per_group * in_per_group + i
        row = (phase_y * stride[1] + phase_x) * channels + channel
        entries.setdefault(row, []).append((o % out_per_group * taps + ky * kernel[1] + kx, j))
    t_row_ptr = pattern.t_row_ptr.tolist()
    assert len(t_row_ptr) == stride[0] * stride[1] * channels + 1 and t_row_ptr[0] == 0
    for row in range(len(t_row_ptr) - 1):
        part = slice(t_row_ptr[row], t_row_ptr[row + 1])
        assert list(zip(pattern.t_col[part].tolist(), pattern.perm[part].tolist(), strict=True)) == sorted(
            entries.get(row, [])
        )


def test_active_zeros_under_a_mask():
    weight = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]])
    mask = torch.tensor([[True, True, True], [False, False, True]])
    pattern, values = SparsePattern.build(weight, mask)
    assert values.tolist() == [1.0, 0.0, 2.0, 3.0]
    assert torch.equal(pattern.mask(), mask) and torch.equal(pattern.to_dense(values), weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_exact_in_every_type(dtype):
    weight = torch.randn(20, 30, dtype=torch.float64).to(dtype) * (torch.rand(20, 30) < 0.3)
    weight[3, 4] = 1e-300 if dtype == torch.float64 else torch.finfo(dtype).smallest_normal  # zero in a shorter type
    for mask in (None, weight != 0):
        pattern, values = SparsePattern.build(weight, mask)
        assert values.dtype == dtype and torch.equal(pattern.to_dense(values), weight)


def test_strides_of_the_weight_do_not_matter():
    weight = sparse_weight((12, 9, 3, 3), 0.4, torch.Generator().manual_seed(0))
    other = weight.to(memory_format=torch.channels_last)
    (one, a), (two, b) = SparsePattern.build(weight), SparsePattern.build(other)
    assert torch.equal(a, b) and all(map(torch.equal, one.tensors, two.tensors))


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="2-D or 4-D"):
        SparsePattern.build(torch.ones(3))
    with pytest.raises(ValueError, match="2-D or 4-D"):
        SparsePattern.build(torch.ones(3, 4, 5))
    with pytest.raises(ValueError, match="mask shape"):
        SparsePattern.build(torch.ones(3, 4), torch.ones(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="not divisible by groups"):
        SparsePattern.build(torch.ones(3, 4, 1, 1), groups=2)


def test_saves_nothing():
    pattern, _ = SparsePattern.build(torch.ones(3, 4))
    assert not pattern.state_dict() and {b.dtype for b in pattern.double().buffers()} == {torch.int32}


def test_building_costs_a_few_readings_of_the_weight():
    """Ten million weights at 90 %: a pattern is built at every load, and must not be felt."""
    weight = sparse_weight((2500, 4000), 0.1, torch.Generator().manual_seed(0))
    conv = ((2500, 4000, 1, 1), (1, 1), (0, 0), (1, 1), 1)
    medians = interleaved_medians(
        {"build": lambda: native.build_pattern(weight, None, conv), "read": lambda: weight.abs().sum()}, rounds=5
    )
    assert medians["build"] < 8 * medians["read"], medians
