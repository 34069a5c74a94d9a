"""What is special about each method."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

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
        gradient = weight.grad.abs().clone()
        # Only the step of an update needs gradients of pruned weights.
        assert bool(gradient[~before].any()) == (step == 4)
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
