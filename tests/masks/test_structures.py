import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparse_ft.masks import compute_masks, prune
from sparse_ft.masks.structures import Structure, expand_groups, group_scores, keep_n_of_m, n_of_m, parse_structure


@pytest.mark.parametrize(
    ("text", "structure"),
    [
        ("unstructured", Structure("unstructured")),
        ("2:4", Structure("n:m", 2, 4)),
        ("1:16", Structure("n:m", 1, 16)),
        ("block_4x1", Structure("block", 4, 1)),
        ("filter", Structure("filter")),
        ("channel", Structure("channel")),
    ],
)
def test_parse(text, structure):
    assert parse_structure(text) == structure


@pytest.mark.parametrize("text", ["4:4", "0:4", "5:4", "block_0x4", "block4", "2:4:8", "", None, "random"])
def test_parse_rejects(text):
    with pytest.raises(ValueError, match="structure"):
        parse_structure(text)


@given(st.integers(1, 5), st.integers(1, 23), st.integers(2, 8), st.data())
def test_n_of_m_keeps_the_highest_of_every_group(rows, length, group, data):
    kept = data.draw(st.integers(1, group - 1))
    scores = torch.rand(rows, length)
    mask = keep_n_of_m(scores, kept, group)
    for start in range(0, length, group):
        part, chosen = scores[:, start : start + group], mask[:, start : start + group]
        count = min(kept, part.shape[1])
        assert (chosen.sum(1) == count).all()
        assert torch.equal((part * chosen).sort(1).values[:, -count:], part.sort(1).values[:, -count:])


def test_n_of_m_breaks_ties_in_order_and_never_counts_padding():
    assert keep_n_of_m(torch.ones(1, 4), 2, 4).tolist() == [[False, False, True, True]]
    pruned = torch.tensor([[-torch.inf, -torch.inf, 1.0]])
    assert keep_n_of_m(pruned, 2, 4).tolist() == [[False, True, True]]


def test_n_of_m_runs_along_the_inputs():
    linear, conv, conv1d = nn.Linear(8, 3, bias=False), nn.Conv2d(8, 3, 2), Conv1D(3, 8)
    masks = compute_masks({"linear": linear, "conv": conv, "conv1d": conv1d}, structure="1:4")
    assert (masks["linear"].view(3, 2, 4).sum(2) == 1).all()
    assert (masks["conv"].permute(0, 2, 3, 1).reshape(-1, 2, 4).sum(2) == 1).all()
    assert (masks["conv1d"].t().reshape(-1, 2, 4).sum(2) == 1).all()


def test_n_of_m_fixes_the_sparsity():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    assert prune(model, structure="2:4").layers[0].sparsity == 0.5
    assert prune(model, 0.75, structure="1:4").layers[0].sparsity == 0.75
    with pytest.raises(ValueError, match="'2:4' fixes the sparsity at 0.5, not 0.9: leave sparsity out"):
        prune(model, 0.9, structure="2:4")


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_block_groups_cover_every_weight_once(outs, ins, positions, rows, columns):
    structure = Structure("block", rows, columns)
    scores = torch.rand(outs, positions, ins)
    means, sizes = group_scores(scores, structure)
    assert int(sizes.sum()) == scores.numel()
    assert torch.allclose((means * sizes).sum(), scores.sum())
    for index in range(len(means)):
        chosen = torch.zeros(len(means), dtype=torch.bool)
        chosen[index] = True
        mask = expand_groups(chosen, scores.shape, structure)
        assert int(mask.sum()) == sizes[index]
        assert torch.allclose(scores[mask].mean(), means[index])


def test_blocks_of_a_convolution_lie_along_channels():
    conv = nn.Conv2d(8, 8, 3, bias=False)
    mask = compute_masks({"conv": conv}, 0.5, structure="block_2x4")["conv"]
    blocks = mask.permute(0, 2, 3, 1).reshape(4, 2, 3, 3, 2, 4).float().mean((1, 5))
    assert set(blocks.flatten().tolist()) == {0.0, 1.0}
    assert blocks.mean() == 0.5


def test_filter_and_channel():
    weight = torch.arange(1.0, 13.0).view(4, 3)
    linear = nn.Linear(3, 4)
    linear.weight.data = weight.clone()
    assert compute_masks({"": linear}, 0.5, structure="filter")[""].all(1).tolist() == [False, False, True, True]
    assert compute_masks({"": linear}, 0.34, structure="channel")[""].all(0).tolist() == [False, True, True]
    conv1d = Conv1D(4, 3)
    conv1d.weight.data = weight.t().clone()
    assert compute_masks({"": conv1d}, 0.5, structure="filter")[""].all(0).tolist() == [False, False, True, True]


def test_global_filters_compare_by_their_mean():
    small, large = nn.Linear(2, 4), nn.Linear(20, 4)
    small.weight.data.fill_(1.0)
    large.weight.data.fill_(0.5)
    masks = compute_masks({"small": small, "large": large}, 0.5, scope="global", structure="filter")
    assert masks["small"].all()
    assert masks["large"].all(1).tolist() == [False, False, True, True]  # 40 of 88 weights, the nearest to 44


def test_n_of_m_of_a_mask():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(16, 64, generator=generator)
    for kept, group in ((2, 4), (1, 4), (4, 8), (3, 8), (4, 16)):
        mask = keep_n_of_m(scores, kept, group)
        assert n_of_m(mask) == f"{kept}:{group}"
        assert n_of_m(mask.t(), transposed=True) == f"{kept}:{group}"
    assert n_of_m(scores < 0.5) is None and n_of_m(scores < 0.05) is None, "unstructured"
    assert n_of_m(scores < -1) is None and n_of_m(scores < 2) is None, "nothing, everything"
    assert n_of_m(keep_n_of_m(torch.rand(4, 6), 2, 4)) is None, "rows that are no whole number of groups"
