"""ProbMask: what its forward passes compute with, its schedule, what it learns."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_ft
from sparse_ft.methods.clock import ExactClock
from sparse_ft.recipes import Recipe, RecipeError

sys.path.append(str(Path(__file__).parents[1] / "session"))

from loop import batch, make, train, training_loss, zeros


def recipe(**fields):
    values = {"params": "['conv.weight', 'hidden.weight']", "final_sparsity": 0.8, "end_epoch": 3}
    return "modifiers:\n  - !ProbMaskModifier\n" + "".join(f"    {k}: {v}\n" for k, v in (values | fields).items())


def test_the_keep_ratio_falls_on_a_cubic_curve():
    modifier = Recipe.load(recipe(end_epoch=10, prune_from=0.2, prune_until=0.6)).modifiers[0]
    clock = ExactClock(10, 100)
    found = [modifier.preview(clock, step)["sparsity"] for step in (0, 20, 40, 60, 99)]
    assert found == pytest.approx([0, 0, 0.8 * (1 - 0.5**3), 0.8, 0.8])


def test_both_samples_are_trained_on():
    model, _, session = make(recipe())
    images, labels = batch(0)
    modifier = session._modifiers[0]
    learned = {}

    def compute():
        loss = F.cross_entropy(model(images), labels)
        learned.update(modifier._learned.values)
        return loss

    with torch.no_grad():
        compute()
        for value in learned.values():
            value.fill_(0.5)
    loss = session.loss(first := compute(), None, images, again=compute)
    modifier._second = True
    second = compute()
    modifier._second = False
    assert float(first.detach()) != float(second.detach())
    torch.testing.assert_close(loss, (first + second) / 2)
    loss.backward()
    assert all(value.grad is not None and value.grad.any() for value in learned.values())
    assert isinstance(model.conv.weight, nn.Parameter) and model.conv.weight.grad.any()


def test_soft_masks_harden():
    model, optimizer, session = make(recipe(end_epoch=4, prune_until=0.2, prune_from=0.1))
    modifier = session._modifiers[0]
    undecided = []

    def look(step):
        if step in (3, 17):
            mask = modifier._soft_mask(
                "hidden.weight", torch.Generator().manual_seed(0),
                1 + (modifier.final_temperature - 1) * session.training.clock.progress(modifier.timing, step),
            )  # fmt: skip
            undecided.append(float(((mask > 0.1) & (mask < 0.9)).float().mean()))

    train(model, optimizer, session, 18, each=look)
    assert undecided[1] < undecided[0] / 2


def test_evaluation_computes_with_the_most_probable_weights():
    model, optimizer, session = make(recipe())
    train(model, optimizer, session, 12)
    images, _ = batch(0)
    model.eval()
    with torch.no_grad():
        first = model(images)
        assert torch.equal(first, model(images))
    modifier = session._modifiers[0]
    kept = sum(int(mask.sum()) for mask in modifier._most_probable(session.training).values())
    assert kept == modifier.budget(session.training)


def test_it_learns_which_weights_matter():
    torch.manual_seed(0)
    model = nn.Linear(20, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    text = recipe(params="[weight]", final_sparsity=0.8, end_epoch=3, learning_rate=0.03)
    session = sparse_ft.SparseSession(model, text, optimizer, 100, total_steps=320)
    target = torch.zeros(20)
    target[[2, 5, 11, 17]] = torch.tensor([1.0, -1.0, 0.7, -0.7])
    for _ in range(320):
        x = torch.randn(32, 20)
        optimizer.zero_grad()

        def compute(x=x):
            return F.mse_loss(model(x)[:, 0], x @ target)

        loss = compute()
        (session.loss(loss, None, x, again=compute) if session.changes_loss else loss).backward()
        session.before_step()
        optimizer.step()
        session.after_step()
    assert model.weight[0].nonzero().flatten().tolist() == [2, 5, 11, 17]


def test_one_sample_needs_nothing_of_the_loop():
    model, optimizer, session = make(recipe(samples=1))
    for step in range(16):
        images, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        session.before_step()
        optimizer.step()
        session.after_step()
    session.finalize()
    assert zeros(model, "conv.weight", "hidden.weight") == pytest.approx(0.8, abs=1e-3)


def test_errors():
    with pytest.raises(RecipeError, match="prune_until.*after prune_from"):
        make(recipe(prune_from=0.5, prune_until=0.4))
    with pytest.raises(RecipeError, match="samples.*1 or 2"):
        make(recipe(samples=3))
    model, _, session = make(recipe())
    images, labels = batch(0)
    with pytest.raises(RecipeError, match="again=f"):
        session.loss(F.cross_entropy(model(images), labels), None, images)
    assert training_loss(session, model, images, labels).requires_grad


def test_hard_masks_are_no_denormal_numbers():
    model, optimizer, session = make(recipe(end_epoch=4))
    modifier = session._modifiers[0]
    train(model, optimizer, session, 1)
    smallest = []
    for value in modifier._learned.values.values():
        with torch.no_grad():
            value.uniform_(0, 1)
    for temperature in (0.15, 0.1, 0.07, 0.03):
        random = torch.Generator().manual_seed(0)
        for name, target in session._modifiers[0].targets.items():
            masked = (target.parameter * modifier._soft_mask(name, random, temperature)).detach().abs()
            smallest.append(masked[masked > 0].min())
    assert min(smallest) > torch.finfo(torch.float32).tiny
