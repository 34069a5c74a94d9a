"""Dropout by the numbers of Philox4x32-10: known answers, and the same result wherever it is computed."""

import pytest
import torch
from oracle import DTYPES

from sparse_ft.ops import BATCH_LAST, philox, reference

KNOWN = [  # counter, key, words: the published vectors of Random123
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
SIZES = [0, 1, 3, 4, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1000, 99_991, 1_050_003]


def dropout(x, p=0.3, seed=1234567890123456789):
    return torch.ops.sparse_ft.dropout(x, p, seed)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    assert [int(word) for word in philox.philox([torch.tensor(word) for word in counter], key)] == list(words)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x299F31D0A4093822])
def test_words_of_the_kernels(isa, seed):
    """An element is kept where its word is the threshold, and dropped where it is one less."""
    words = philox.words(67, seed)
    if seed == 0:
        assert tuple(words[:4].tolist()) == KNOWN[0][2]
    for i, word in enumerate(words.tolist()):
        ones = torch.ones(67)
        assert dropout(ones, word / 2**32, seed)[i] != 0
        assert dropout(ones, (word + 1) / 2**32, seed)[i] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_same_bits_everywhere(isa, size, dtype):
    x = torch.randn(size).to(dtype)
    want = reference.dropout(x, 0.3, 99)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(dropout(x, 0.3, 99), want)
        assert torch.equal(dropout(x[1:], 0.3, 99), reference.dropout(x[1:], 0.3, 99))  # not at a vector's start


@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_than_the_caches(isa, dtype):
    """Stored around them, whole vectors and a rest."""
    x = torch.randn(2_500_007).to(dtype)
    assert torch.equal(dropout(x), reference.dropout(x, 0.3, 1234567890123456789))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_share_and_scale(p):
    count = 1_000_000
    y = dropout(torch.ones(count), p)
    kept = torch.count_nonzero(y).item() / count
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    for step in (1, 2, 3, 4, 5, 16, 64):  # neighbours know nothing of each other
        both = torch.count_nonzero(y[step:] * y[:-step]).item() / count
        assert both == pytest.approx((1 - p) ** 2, abs=6 * ((1 - p) ** 2 / count) ** 0.5 + 1e-4)


def test_seeds_differ():
    masks = [dropout(torch.ones(100_000), 0.5, seed) > 0 for seed in (0, 1, 2**32, 2**33)]
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert abs((mask == other).float().mean().item() - 0.5) < 0.01


def test_extremes(isa):
    x = torch.randn(1000)
    assert torch.equal(dropout(x, 0.0), x)
    assert torch.equal(dropout(x, 1.0), torch.zeros(1000))
    with pytest.raises(ValueError, match="between 0 and 1"):
        dropout(x, 1.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        dropout(x, float("nan"))


def test_not_finite_as_in_torch(isa):
    """Dropped is multiplied by zero: what is not a number shows."""
    for value in (float("inf"), float("nan")):
        y = dropout(torch.full((64,), value), 0.5)
        kept = dropout(torch.ones(64), 0.5) > 0
        assert y[~kept].isnan().all() and not y[kept].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_the_same_mask(isa, dtype):
    x, grad = torch.randn(33, 65).to(dtype).requires_grad_(True), torch.randn(33, 65).to(dtype)
    (got,) = torch.autograd.grad(dropout(x), x, grad)
    assert torch.equal(got, dropout(grad))
    (of_strided,) = torch.autograd.grad(dropout(x), x, grad.t().contiguous().t())
    assert torch.equal(of_strided, got)


def test_nothing_is_kept_for_backward():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropout(torch.randn(100, requires_grad=True))
    assert not kept


def test_second_derivatives():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x).square(), (x,))


def test_elements_are_counted_in_the_order_of_the_tensor():
    x = torch.randn(6, 5, 4, 3)
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        torch.ops.sparse_ft.to_layout(x, BATCH_LAST),
        x.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        y = dropout(other)
        assert torch.equal(y, dropout(x)) and y.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types(dtype):
    x = torch.randn(1000).to(dtype)
    y = dropout(x)
    assert y.dtype == dtype
    assert torch.equal(y == 0, dropout(torch.ones(1000)) == 0)
