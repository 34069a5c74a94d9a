"""What is special about each method."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparse_ft import RecipeError, SparseSession

sys.path.append(str(Path(__file__).parents[1] / "session"))

from loop import STEPS, batch, make, train, zeros

HIDDEN = "params: [hidden]"
GRADUAL = f"{HIDDEN}, init_sparsity: 0.25, final_sparsity: 0.75, start_epoch: 1, end_epoch: 3, update_frequency: 1"
DYNAMIC = f"{HIDDEN}, final_sparsity: 0.8, start_epoch: 0, end_epoch: 3, update_frequency: 0.8"


def recipe(modifier):
    return f"modifiers:\n  - {modifier}\n"


def masks_by_step(text, name="hidden.weight", epochs=4):
    model, optimizer, session = make(recipe(text), epochs=epochs)
    dense = torch.ones_like(model.get_parameter(name), dtype=torch.bool)
    masks = []
    train(
        model,
        optimizer,
        session,
        epochs * STEPS,
        each=lambda step: masks.append(session.masks.get(name, dense).clone()),
    )
    return masks


@pytest.mark.parametrize("name", ["RigL", "SET"])
def test_weights_move_at_updates_and_less_each_time(name):
    masks = masks_by_step(f"!{name}PruningModifier {{{DYNAMIC}}}")
    assert {int(mask.sum()) for mask in masks} == {round(0.2 * masks[0].numel())}
    moved = {step: int((masks[step] & ~masks[step - 1]).sum()) for step in range(1, len(masks))}
    assert [step for step, count in moved.items() if count] == [4, 8, 12]
    if name == "SET":
        assert moved[4] > moved[8] > moved[12]


def test_rigl_grows_where_the_dense_gradient_is_largest():
    model, optimizer, session = make(recipe(f"!RigLPruningModifier {{{DYNAMIC}}}"))
    weight = model.hidden.weight
    for step in range(5):
        images, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        before = session.masks.get("hidden.weight", torch.ones_like(weight, dtype=torch.bool)).clone()
        if step:
            gradient = session.training.masks.gradient("hidden.weight").abs().clone()
            # Only the step of an update looks at gradients of pruned weights; the optimizer never sees them.
            assert bool(gradient[~before].any()) == (step == 4)
            assert not weight.grad[~before].any()
        session.before_step()
        optimizer.step()
        session.after_step()
    after = session.masks["hidden.weight"]
    grown, stays = after & ~before, after & before
    assert grown.any()
    assert gradient[grown].min() >= gradient[~after].max()
    assert stays.sum() < before.sum()


def test_movement_keeps_what_moves_away_from_zero():
    model, optimizer, session = make(recipe(f"!MovementPruningModifier {{{GRADUAL}}}"))
    scores = torch.zeros_like(model.hidden.weight)
    for step in range(2 * STEPS + 1):
        images, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        if step >= STEPS:
            scores -= 0.01 * model.hidden.weight.grad * model.hidden.weight.detach()
        pruned = model.hidden.weight.detach() == 0
        session.before_step()
        optimizer.step()
        session.after_step()
    mask = session.masks["hidden.weight"]
    assert int((~mask).sum()) == round(mask.numel() * (0.25 + 0.5 * 0.875))
    assert not (mask & pruned).any()
    assert scores[mask].min() >= scores[~mask & ~pruned].max()


@pytest.mark.parametrize(("structure", "dimension"), [("filter", 1), ("channel", 0)])
def test_structured_pruning_takes_whole_channels(structure, dimension):
    mask = masks_by_step(f"!StructuredPruningModifier {{{GRADUAL}, mask_type: {structure}}}")[-1]
    kept = mask.sum(dimension)
    assert set(kept.unique().tolist()) == {0, mask.shape[dimension]}
    assert int((kept == 0).sum()) == round(0.75 * len(kept))


def test_one_shot_waits_for_its_time():
    model, optimizer, session = make(recipe(f"!OneShotPruningModifier {{{HIDDEN}, sparsity: 0.6, start_epoch: 1}}"))
    train(model, optimizer, session, STEPS)
    assert zeros(model, "hidden.weight") == 0.0
    assert not session.settled
    train(model, optimizer, session, 1)
    assert zeros(model, "hidden.weight") == pytest.approx(0.6, abs=1e-3)
    assert session.settled


def obs(**fields):
    values = {"num_grads": 4, "fisher_block_size": 8, "damp": 0.01} | fields
    extra = ", ".join(f"{name}: {value}" for name, value in values.items())
    return f"!OBSPruningModifier {{{GRADUAL.replace('start_epoch: 1', 'start_epoch: 0')}, {extra}}}"


@pytest.mark.parametrize("structure", ["unstructured", "block4"])
def test_obs_is_the_surgeon_of_each_block(structure):
    """Scores, masks and steps are those of the Fisher matrix written out."""
    model, optimizer, session = make(recipe(obs(mask_type=structure)))
    images, labels = batch(0)
    F.cross_entropy(model(images), labels).backward()
    weight = model.hidden.weight.detach().clone().double().flatten()
    model.eval()
    gradients = []
    for loss in session.training.grad_sampler(4, 1, None):
        gradients.append(torch.autograd.grad(loss, model.hidden.weight)[0].double().flatten())
    model.train()
    session.before_step()
    gradients = torch.stack(gradients).view(4, -1, 8)
    size = 4 if structure == "block4" else 1
    scores, inverses = [], []
    for block in range(gradients.shape[1]):
        g = gradients[:, block]
        inverse = torch.linalg.inv(g.T @ g / 4 + 0.01 * torch.eye(8, dtype=torch.float64))
        inverses.append(inverse)
        for i in range(0, 8, size):
            w, corner = weight[8 * block + i : 8 * block + i + size], inverse[i : i + size, i : i + size]
            scores.append(w @ torch.linalg.inv(corner) @ w / 2)
    order = torch.stack(scores).argsort()
    going = torch.zeros(len(scores), dtype=torch.bool)
    going[order[: round(0.25 * len(scores))]] = True
    going = going.repeat_interleave(size)
    assert torch.equal(session.masks["hidden.weight"].flatten(), ~going)
    for block, inverse in enumerate(inverses):
        part = slice(8 * block, 8 * block + 8)
        q, w = going[part], weight[part]
        step = -inverse[:, q] @ torch.linalg.inv(inverse[q][:, q]) @ w[q] if q.any() else torch.zeros(8).double()
        torch.testing.assert_close(
            model.hidden.weight.detach().flatten()[part].double(), w + step, rtol=1e-3, atol=1e-5
        )


def test_obs_leaves_no_trace_but_the_weights():
    model, optimizer, session = make(recipe(obs(num_recomputations=2)))
    mean, state = model.norm.running_mean.clone(), torch.get_rng_state()
    images, labels = batch(0)
    F.cross_entropy(model(images), labels).backward()
    mean, gradient = model.norm.running_mean.clone(), model.conv.weight.grad.clone()
    session.before_step()
    assert torch.equal(model.norm.running_mean, mean)
    assert torch.equal(model.conv.weight.grad, gradient)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_obs_takes_gradients_that_repeat(scale):
    """The same batch again and again gives a Fisher matrix of rank one, which rounding must not upset."""
    model, optimizer, session = make(recipe(obs(num_grads=9, fisher_block_size=48, damp=1e-7)))
    images, labels = batch(0)

    def sampler(count, seed, batch_size):
        for _ in range(count):
            yield scale * F.cross_entropy(model(images), labels)

    session.training.grad_sampler = sampler
    F.cross_entropy(model(images), labels).backward()
    session.before_step()
    assert model.hidden.weight.isfinite().all()
    assert zeros(model, "hidden.weight") == pytest.approx(0.25, abs=1e-3)


def test_obs_refuses_a_gradient_that_is_not_finite():
    model, optimizer, session = make(recipe(obs()))
    images, labels = batch(0)
    session.training.grad_sampler = lambda count, *_: (model(images).sum() * float("nan") for _ in range(count))
    F.cross_entropy(model(images), labels).backward()
    with pytest.raises(RecipeError, match=r"OBSPruningModifier: a sampled gradient of hidden.weight is not finite"):
        session.before_step()


def test_obs_needs_a_sampler():
    model, optimizer, session = make(recipe(obs()), grad_sampler=None)
    with pytest.raises(RecipeError, match="OBSPruningModifier: needs a grad_sampler"):
        train(model, optimizer, session, 1)


def test_topkast_computes_with_fewer_weights_than_it_trains():
    fields = "params: ['hidden.weight'], forward_sparsity: 0.8, backward_sparsity: 0.5, start_epoch: 0, end_epoch: 3"
    model, optimizer, session = make(
        recipe(f"!TopKASTPruningModifier {{{fields}, update_frequency: 0.4, active_weight_decay: 0.02}}")
    )
    modifier, weight = session._modifiers[0], model.hidden.weight
    sets, before = [], None

    def check(step):
        nonlocal before
        if step >= 3 * STEPS:
            return
        assert int((weight == 0).sum()) == round(0.8 * weight.numel())
        trains = session.masks["hidden.weight"]
        assert int((~trains).sum()) == round(0.5 * weight.numel())
        hidden = modifier.hidden["hidden.weight"]
        assert torch.equal(weight[weight != 0], hidden[weight != 0])
        if before is not None:  # what does not train keeps its value
            assert torch.equal(hidden[~trains], before[~trains])
            assert (hidden != before)[trains & (weight == 0)].any()
        before = hidden.clone()
        sets.append((weight != 0).clone())

    train(model, optimizer, session, 4 * STEPS, each=check)
    assert (sets[-1] & ~sets[0]).any()  # others compute at the end than at the beginning
    assert torch.equal(session.masks["hidden.weight"], weight != 0)


def test_a_learned_threshold_moves_along_its_gradient_and_its_decay():
    fields = "params: ['hidden.weight'], start_epoch: 0, end_epoch: 3, init_threshold: 0.02, threshold_decay: 0.5"
    model, optimizer, session = make(recipe(f"!STRPruningModifier {{{fields}}}"))
    train(model, optimizer, session, 2)
    modifier = session._modifiers[0]
    s = torch.tensor(modifier._s["hidden.weight"], requires_grad=True)
    hidden = modifier.hidden["hidden.weight"].clone().requires_grad_()
    view = hidden.sign() * F.relu(hidden.abs() - torch.sigmoid(s))
    torch.testing.assert_close(model.hidden.weight, view)

    images, labels = batch(2)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    outputs = torch.func.functional_call(model, {"hidden.weight": view}, (images,))
    F.cross_entropy(outputs, labels).backward()
    for name, buffer in model.named_buffers():
        buffer.copy_(statistics[name])
    expected = float((s - 0.05 * (s.grad + 0.5 * s)).detach())
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    torch.testing.assert_close(model.hidden.weight.grad, hidden.grad)
    session.before_step()
    assert modifier._s["hidden.weight"] == pytest.approx(expected, rel=1e-5)


def test_filters_of_a_group_go_together():
    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a = torch.nn.Conv2d(3, 8, 3)
            self.b = torch.nn.Conv2d(4, 8, 1)
            self.other = torch.nn.Conv2d(4, 6, 1)

    def pruned(groups):
        model = Residual()
        text = recipe(
            f"!StructuredPruningModifier {{init_sparsity: 0, final_sparsity: 0.5, start_epoch: 0, end_epoch: 1,"
            f" update_frequency: 1, param_groups: {groups}}}"
        )
        session = SparseSession(model, text, torch.optim.SGD(model.parameters(), 0.0), 1, total_steps=1)
        session.before_step()
        session.after_step()
        masks = {name: mask.flatten(1) for name, mask in session.masks.items()}
        assert all(torch.equal(mask.any(1), mask.all(1)) for mask in masks.values())
        return model, {name: mask.all(1) for name, mask in masks.items()}

    fresh = Residual()
    means = torch.cat([fresh.a.weight.flatten(1), fresh.b.weight.flatten(1)], 1).abs().mean(1)
    _, kept = pruned("[[a.weight, b]]")
    assert torch.equal(kept["a.weight"], kept["b.weight"])
    assert set(kept["a.weight"].nonzero().flatten().tolist()) == set(means.topk(4).indices.tolist())
    assert int(kept["other.weight"].sum()) == 3
    _, apart = pruned("null")
    assert not torch.equal(apart["a.weight"], apart["b.weight"])
    for groups, problem in (
        ("[[a, other]]", "as many filters: a.weight 8, other.weight 6"),
        ("[[a, b], [b, a]]", "is in two groups"),
        ("[[a, c]]", "'c' matches no parameter"),
    ):
        with pytest.raises(RecipeError, match=f"param_groups: .*{problem}"):
            pruned(groups)
