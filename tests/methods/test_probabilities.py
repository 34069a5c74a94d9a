"""Probabilities of masks: the projection onto their budget and the estimate of their gradient."""

import itertools

import pytest
import torch

from sparse_ft.methods.fbps.estimator import draw, policy_gradient, preconditioned_score
from sparse_ft.methods.probabilities import Learned, clip, generator, project


@pytest.mark.parametrize("low", [0.0, 0.05])
@pytest.mark.parametrize("seed", range(20))
def test_projection_is_the_nearest_point(seed, low):
    """By the conditions of optimality: one shift v for all values strictly inside, none where the budget is slack."""
    generated = torch.Generator().manual_seed(seed)
    values = torch.rand(50, generator=generated, dtype=torch.float64) * 3 - 1
    sizes = torch.randint(1, 5, (50,), generator=generated)
    budget = float(sizes.sum()) * (0.1 + 0.4 * float(torch.rand(1, generator=generated)))
    found = project(values, budget, sizes, low)
    assert found.ge(low).all() and found.le(1).all()
    assert float((sizes * found).sum()) == pytest.approx(budget, abs=1e-9)
    inside = (found > low) & (found < 1)
    shifts = (values - found)[inside]
    assert shifts.min() >= 0 and shifts.max() - shifts.min() < 1e-9
    assert (values - shifts[0])[found == low].le(low + 1e-9).all()
    assert (values - shifts[0])[found == 1].ge(1 - 1e-9).all()


def test_projection_within_the_budget_only_clips():
    values = torch.tensor([-0.5, 0.3, 1.5])
    assert project(values, 2.0).tolist() == pytest.approx([0.0, 0.3, 1.0])


def test_projection_of_many_values_in_several_tensors():
    """More than fit a piece, found from a sample, also where tensors lie in channels_last order."""
    generated = torch.Generator().manual_seed(0)
    values = torch.randn(40, 50, 5, 5, generator=generated).mul_(0.5).contiguous(memory_format=torch.channels_last)
    more = torch.rand(70_000, generator=generated)
    together = torch.cat([values.flatten(), more])
    learned = Learned({"a": values.clone(memory_format=torch.preserve_format), "b": more.clone()})
    learned.project(30_000)
    found = torch.cat([learned.values["a"].flatten(), learned.values["b"]])
    assert float(found.double().sum()) == pytest.approx(30_000, abs=0.01)
    shifts = (together - found)[(found > 0) & (found < 1)]
    assert shifts.min() > 0 and shifts.max() - shifts.min() < 1e-6
    torch.testing.assert_close(project(together, 30_000.0), found, rtol=0, atol=1e-7)


def test_projection_of_equal_values():
    assert project(torch.full((10,), 0.9), 5.0).tolist() == pytest.approx([0.5] * 10)


def test_a_budget_below_the_floor_is_an_error():
    with pytest.raises(ValueError, match="at least 0.5 sum to 5, above 4"):
        project(torch.ones(10), 4.0, low=0.5)


def everything(count):
    return torch.tensor(list(itertools.product([False, True], repeat=count)))


def analytic(count=5):
    """A loss of masks, its exact expectation as a function of the probabilities, and all masks."""
    torch.manual_seed(0)
    matrix, target = torch.randn(count, count, dtype=torch.float64), torch.randn(count, dtype=torch.float64)
    masks = everything(count)
    losses = ((masks.double() @ matrix - target) ** 2).sum(1)

    def chances(s):
        return torch.where(masks, s, 1 - s).prod(1)

    return masks, losses, chances


def test_the_estimate_is_unbiased():
    """Summed over all pairs of masks, it is the exact gradient times sqrt(s (1 - s))."""
    masks, losses, chances = analytic()
    s = torch.tensor([0.1, 0.3, 0.5, 0.8, 0.95], dtype=torch.float64, requires_grad=True)
    (losses * chances(s)).sum().backward()
    exact = s.grad * (s * (1 - s)).detach().sqrt()
    s = s.detach()
    chance = chances(s)
    mean = torch.zeros_like(s)
    for i, j in itertools.product(range(len(masks)), repeat=2):
        mean += chance[i] * chance[j] * policy_gradient(float(losses[i] - losses[j]), masks[i], masks[j], s)
    torch.testing.assert_close(mean, exact, rtol=1e-9, atol=1e-9)


def test_the_estimate_has_bounded_variance_where_the_plain_one_has_not():
    masks, losses, chances = analytic()

    def variances(small):
        s = torch.tensor([small, 0.3, 0.5, 0.8, 0.95], dtype=torch.float64)
        chance = chances(s)
        pairs = [
            (chance[i] * chance[j], policy_gradient(float(losses[i] - losses[j]), masks[i], masks[j], s))
            for i, j in itertools.product(range(len(masks)), repeat=2)
        ]
        mean = sum(p * each for p, each in pairs)
        ours = sum(p * (each - mean).square().sum() for p, each in pairs)
        scores = torch.stack([preconditioned_score(mask, s) / (s * (1 - s)).sqrt() for mask in masks])
        plain = losses[:, None] * scores
        center = (chance[:, None] * plain).sum(0)
        return float(ours), float((chance[:, None] * (plain - center).square()).sum())

    (ours, plain), (ours_small, plain_small) = variances(1e-2), variances(1e-4)
    assert ours < plain / 10
    assert plain_small > 20 * plain and ours_small < 2 * ours


def test_probabilities_of_zero_and_one_have_no_gradient():
    s = torch.tensor([0.0, 1.0, 0.5])
    assert preconditioned_score(torch.tensor([False, True, True]), s).tolist() == [0.0, 0.0, 1.0]


def test_draws_are_reproducible_and_independent():
    s = torch.full((20_000,), 0.3)
    first, again, other, later = (
        draw(s, generator(0, step, number)).float() for step, number in ((7, 0), (7, 0), (7, 1), (8, 0))
    )
    assert torch.equal(first, again)
    assert abs(float(first.mean()) - 0.3) < 0.02
    for different in (other, later):
        correlation = torch.corrcoef(torch.stack([first, different]))[0, 1]
        assert abs(float(correlation)) < 0.03


def test_adam_is_that_of_torch():
    torch.manual_seed(0)
    start = torch.rand(8)
    learned = Learned({"a": start.clone()})
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([parameter], lr=0.02)
    for _ in range(5):
        gradient = torch.randn(8)
        learned.step({"a": gradient}, 0.02)
        parameter.grad = gradient
        optimizer.step()
        torch.testing.assert_close(learned.values["a"], parameter.detach(), rtol=1e-5, atol=1e-6)
        learned = Learned.of_state(learned.state_dict())


def test_clipping_is_joint():
    clipped = clip({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1.0)
    assert float(clipped["a"]) == pytest.approx(0.6) and float(clipped["b"]) == pytest.approx(0.8)
    assert float(clip({"a": torch.tensor([0.5])}, 1.0)["a"]) == 0.5
