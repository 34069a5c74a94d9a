"""FBPS: what its steps compute, what it learns, what it leaves."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparse_ft
from sparse_ft.methods import FieldError
from sparse_ft.recipes import RecipeError

sys.path.append(str(Path(__file__).parents[1] / "session"))

from loop import STEPS, batch, make, train, training_loss


def recipe(**fields):
    values = {"params": "['conv.weight', 'hidden.weight']", "final_sparsity": 0.5, "end_epoch": 2, "candidates": 0}
    return "modifiers:\n  - !FBPSModifier\n" + "".join(f"    {k}: {v}\n" for k, v in (values | fields).items())


def modifier_of(session):
    return session._modifiers[0]


def kept_now(session):
    return modifier_of(session).kept_units(session.training)


def test_every_step_trains_another_sub_network_within_the_budget():
    model, optimizer, session = make(recipe(end_epoch=4))
    masks, sums = [], []

    def look(step):
        if session.training.step < 4 * STEPS:
            masks.append(kept_now(session))
        sums.append(float(modifier_of(session)._probabilities.sum()))

    train(model, optimizer, session, 3 * STEPS, each=look)
    assert len({tuple(mask.tolist()) for mask in masks}) > 10
    assert max(sums) <= 16 + 1e-3, "half of 8 and 24"


@pytest.mark.parametrize("backward", ["one", "both"])
def test_weights_have_the_gradients_of_the_drawn_sub_networks(backward):
    model, _, session = make(recipe(backward=backward))
    model.double()
    images, labels = batch(0)
    images = images.double()
    training_loss(session, model, images, labels).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    modifier = modifier_of(session)
    expected = {name: torch.zeros_like(gradient) for name, gradient in found.items()}
    numbers = (0, 1) if backward == "both" else (0,)
    for number in numbers:
        kept = modifier._units(modifier._mask(session.training, number))
        model.zero_grad()
        channels = modifier.channels
        masks = {
            place.layer: place.made_by(kept).double()
            for place in channels.places
            if place.kind in ("weight", "affine")
        }
        x = F.relu(model.stem(images) * masks["stem"].view(1, -1, 1, 1))
        x = F.relu(model.norm(model.conv(x) * masks["conv"].view(1, -1, 1, 1)) * masks["norm"].view(1, -1, 1, 1))
        F.cross_entropy(model.head(F.relu(model.hidden(x.flatten(1)) * masks["hidden"])), labels).backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad / len(numbers)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_accumulated_batches_share_their_masks():
    """Two half batches of a step move the probabilities as the whole batch does."""
    results = []
    for parts in (1, 2):
        model, optimizer, session = make(recipe(learning_rate=0.1))
        model.norm = nn.Identity()  # whose statistics would see half a batch
        images, labels = batch(0)
        for chunk, answers in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            (training_loss(session, model, chunk, answers) / parts).backward()
        session.before_step()
        optimizer.step()
        session.after_step()
        results.append((modifier_of(session)._probabilities.clone(), model.conv.weight.detach().clone()))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_dropout_is_the_same_for_both_masks():
    model, _, session = make(recipe(final_sparsity=0.0))  # both masks are whole
    model.norm = nn.Dropout(0.5)
    images, labels = batch(0)
    losses = []

    def compute():
        losses.append(F.cross_entropy(model(images), labels))
        return losses[-1]

    session.loss(compute(), None, images, again=compute)
    after = torch.get_rng_state()
    assert torch.equal(losses[0], losses[1])
    torch.manual_seed(0)
    assert not torch.equal(after, torch.get_rng_state()), "what follows draws anew"


class Features(nn.Module):
    """Given features, of which the answer needs two."""

    def __init__(self):
        super().__init__()
        self.features, self.answer = nn.Linear(12, 12, bias=False), nn.Linear(12, 1, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.eye(12))
            self.answer.weight.zero_()
            self.answer.weight[0, [3, 8]] = torch.tensor([1.0, -1.0])

    def forward(self, x):
        return self.answer(self.features(x))


@pytest.mark.parametrize("backward", ["one", "both"])
def test_it_learns_which_channels_matter(backward):
    model = Features()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    text = recipe(params="[features.weight]", final_sparsity=0.75, end_epoch=3, learning_rate=0.05, backward=backward)
    session = sparse_ft.SparseSession(model, text, optimizer, 100, total_steps=300)
    torch.manual_seed(0)
    for _ in range(300):
        x = torch.randn(32, 12)

        def compute(x=x):
            return F.mse_loss(model(x)[:, 0], x[:, 3] - x[:, 8])

        loss = compute()
        optimizer.zero_grad()
        (session.loss(loss, None, x, again=compute) if session.changes_loss else loss).backward()
        session.before_step()
        optimizer.step()
        session.after_step()
    left = model.features.weight.any(1).nonzero().flatten().tolist()
    assert len(left) == 3 and {3, 8} <= set(left)


def test_evaluation_takes_the_likeliest_channels_and_changes_nothing():
    model, optimizer, session = make(recipe())
    train(model, optimizer, session, 3)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    images, _ = batch(0)
    model.eval()
    with torch.no_grad():
        first = model(images)
        assert torch.equal(first, model(images))
    assert int(kept_now(session).sum()) - 4 <= 16  # with the 4 of the stem, which stay
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_statistics_see_the_trained_mask_only():
    model, optimizer, session = make(recipe())
    images, labels = batch(0)
    before = model.norm.running_mean.clone()
    loss = training_loss(session, model, images, labels)
    after = model.norm.running_mean.clone()
    kept = kept_now(session)
    rows = next(place.rows for place in modifier_of(session).channels.weights() if place.layer == "conv")
    assert torch.equal(after[~kept[rows]], before[~kept[rows]])
    assert (after != before)[kept[rows]].all()
    assert int(model.norm.num_batches_tracked) == 1
    loss.backward()


@pytest.mark.parametrize("candidates", [0, 4])
def test_the_last_mask_has_the_budget_and_the_floor(candidates):
    model, optimizer, session = make(recipe(final_sparsity=0.8, min_channels=3, candidates=candidates))
    train(model, optimizer, session, 4 * STEPS)
    session.finalize()
    kept = [int(weight.flatten(1).any(1).sum()) for weight in (model.conv.weight, model.hidden.weight)]
    assert min(kept) >= 3 and sum(kept) == 6
    assert not model.hidden.bias[~model.hidden.weight.any(1)].any()
    assert not model.norm.bias[~model.conv.weight.flatten(1).any(1)].any()
    expected = model.eval()(batch(0)[0])
    report = sparse_ft.remove_channels(model, batch(0)[0])
    assert len(model.conv.weight) == kept[0] and len(model.hidden.weight) == kept[1]
    assert report.parameters_after < report.parameters_before
    torch.testing.assert_close(model(batch(0)[0]), expected, rtol=1e-5, atol=1e-6)


def test_the_best_candidate_is_the_one_with_the_lowest_loss():
    seen = []

    def sampler(count, seed, batch_size):
        modifier = modifier_of(session)
        value = float(modifier._candidate.float() @ torch.arange(36.0))  # which mask is being tried
        seen.append((value, modifier._candidate.clone()))
        for _ in range(count):
            yield torch.tensor(value)

    model, optimizer, session = make(recipe(candidates=5), grad_sampler=sampler)
    train(model, optimizer, session, 2 * STEPS + 1)
    assert len(seen) == 5
    assert torch.equal(kept_now(session), min(seen, key=lambda pair: pair[0])[1])


def test_magnitudes_can_begin():
    model, optimizer, session = make(recipe(init="magnitude"))
    with torch.no_grad():
        model.hidden.weight[:6] *= 10
    images, labels = batch(0)
    training_loss(session, model, images, labels)
    probabilities = modifier_of(session).probabilities()
    assert probabilities[-24:][:6].min() > 2 * probabilities[-24:][6:].max()


def test_the_budget_can_fall_from_everything():
    """For a trained model, which half of its channels would not do."""
    model, optimizer, session = make(recipe(prune_from=0.2, prune_until=0.6, end_epoch=3))
    modifier, sums, shown = modifier_of(session), [], []

    def look(step):
        if session.training.step < 3 * STEPS:
            model.eval()(batch(0)[0])
            shown.append((int(kept_now(session).sum()) - 4, modifier.budget(session.training)))
            model.train()
        sums.append(float(modifier._probabilities.sum()))

    train(model, optimizer, session, 4 * STEPS, each=look)
    fifth, last = 3 * STEPS // 5, 3 * STEPS - 1
    assert sums[: fifth - 1] == [32.0] * (fifth - 1), "everything: 8 and 24"
    assert all(later < earlier + 1e-3 for earlier, later in zip(sums, sums[1:], strict=False))
    assert sums[3 * STEPS * 2 // 5] < 32
    assert sums[last] <= 16 + 1e-3
    assert all(kept <= budget for kept, budget in shown)
    assert session._modifiers[0].preview(session.training.clock, last)["sparsity"] == 0.5
    left = sum(int(weight.flatten(1).any(1).sum()) for weight in (model.conv.weight, model.hidden.weight))
    assert left == 16


@pytest.mark.parametrize("native", [True, False])
def test_narrow_convolutions_compute_natively_unless_told_otherwise(native):
    model, _, session = make(recipe(native=str(native).lower()))
    seen = []
    model.conv.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    images, labels = batch(0)
    several = images.repeat(16 // len(images) + 1, 1, 1, 1)
    model(several)
    model(images[:8])
    with torch.autocast("cpu", torch.bfloat16):
        model(several)
    assert seen[-3:] == ["VaryingConv" if native else "Conv2d", "Conv2d", "Conv2d"]
    assert type(model.conv) is nn.Conv2d


def test_all_convolutions_are_drawn_if_none_is_named():
    model, _, session = make("modifiers:\n  - !FBPSModifier {final_sparsity: 0.5, end_epoch: 2, candidates: 0}\n")
    assert list(modifier_of(session).find_targets(model)) == ["stem.weight", "conv.weight"]


def test_errors():
    with pytest.raises(RecipeError, match="line 6.*candidates.*grad_sampler"):
        make(recipe(candidates=3), grad_sampler=None)
    with pytest.raises(RecipeError, match="final_sparsity"):
        make(recipe(final_sparsity=1.0))
    with pytest.raises(RecipeError, match="min_probability.*at most the share"):
        make(recipe(final_sparsity=0.8, min_probability=0.3))
    with pytest.raises(RecipeError, match="end_epoch"):
        make(recipe(end_epoch=-1))
    with pytest.raises(RecipeError, match="prune_until.*after prune_from"):
        make(recipe(prune_from=0.5, prune_until=0.4))
    model, optimizer, session = make(recipe(params="[head.weight]"))
    with pytest.raises(FieldError, match="none of these weights has output channels"):
        model(batch(0)[0])


def test_a_loop_that_does_not_give_its_loss_is_told():
    model, _, session = make(recipe())
    images, labels = batch(0)
    F.cross_entropy(model(images), labels).backward()
    with pytest.raises(RecipeError, match="session.loss"):
        session.before_step()
    model, _, session = make(recipe())
    with pytest.raises(RecipeError, match="again=f"):
        session.loss(F.cross_entropy(model(images), labels), None, images)
