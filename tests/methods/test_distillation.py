"""Learning from a teacher."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparse_ft import RecipeError, SparseSession, convert
from sparse_ft.live import native_layers, preserved_parameters

sys.path.append(str(Path(__file__).parents[1] / "session"))

from loop import OPTIMIZERS, STEPS, Network, batch, gmp

DISTIL = "\n  - !DistillationModifier {hardness: 0.75, temperature: 2.0, start_epoch: 1, end_epoch: 3}\n"
LAYERS = "\n  - !PerLayerDistillationModifier {gain: 0.05, student_layer_names: [conv, hidden]}\n"


def make(text, teacher, seed=0):
    model = Network(seed)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    return model, optimizer, SparseSession(model, text, optimizer, STEPS, teacher=teacher)


def train(model, optimizer, session, steps):
    losses = []
    for _ in range(steps):
        images, labels = batch(session.step)
        optimizer.zero_grad()
        outputs = model(images)
        hard = F.cross_entropy(outputs, labels)
        loss = session.loss(hard, outputs, images)
        loss.backward()
        losses.append((float(hard.detach()), float(loss.detach())))
        session.before_step()
        optimizer.step()
        session.after_step()
    return losses


def test_the_loss_is_that_of_the_paper():
    teacher = Network(seed=5)
    model, optimizer, session = make(gmp() + DISTIL, teacher)
    before = train(model, optimizer, session, STEPS)
    assert all(hard == loss for hard, loss in before)
    assert session.changes_loss
    images, labels = batch(session.step)
    ours, theirs = model(images), teacher.eval()(images).detach()
    hard = F.cross_entropy(ours, labels)
    log_p, q = F.log_softmax(ours / 2, -1), F.softmax(theirs / 2, -1)
    soft = (q * (q.log() - log_p)).sum(-1).mean() * 4
    expected = (0.75 * soft + 0.25 * hard).detach()
    torch.testing.assert_close(session.loss(hard, ours, images).detach(), expected)
    half = session.loss(hard, {"logits": ours}, (images,), scale=0.5)
    torch.testing.assert_close(half.detach(), (0.375 * soft + 0.25 * hard).detach())
    train(model, optimizer, session, 2 * STEPS)
    assert not session.changes_loss
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_layers_of_the_teacher():
    teacher = Network(seed=5)
    model, optimizer, session = make(gmp() + LAYERS, teacher)
    losses = train(model, optimizer, session, 4 * STEPS)
    assert all(loss > hard for hard, loss in losses)
    assert losses[-1][1] - losses[-1][0] < losses[0][1] - losses[0][0]  # they come nearer
    session.finalize()
    assert not model.conv._forward_hooks and not teacher.conv._forward_hooks


class Wide(Network):
    """A teacher with more features in its layers."""

    def __init__(self):
        super().__init__(seed=5)
        self.conv = torch.nn.Conv2d(4, 12, 3, stride=2, padding=1)
        self.norm = torch.nn.BatchNorm2d(12)
        self.hidden = torch.nn.Linear(12 * 9, 40)
        self.head = torch.nn.Linear(40, 4)


def test_features_are_mapped_to_those_of_a_wider_teacher():
    text = gmp() + LAYERS
    whole = make(text, Wide())
    losses = train(*whole, 8)
    assert losses[-1][1] - losses[-1][0] < 0.9 * (losses[0][1] - losses[0][0])
    saved = copy.deepcopy([part.state_dict() for part in whole])
    assert saved[2]["modifiers"][1]["state"]["projections"]["0"]["map"].shape == (12, 8)
    train(*whole, 7)
    model, optimizer, session = make(text, Wide(), seed=3)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    session.load_state_dict(saved[2])
    train(model, optimizer, session, 7)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in whole[0].state_dict().items())
    assert len(optimizer.param_groups) == 1


def test_features_that_are_not_to_be_mapped():
    text = gmp() + LAYERS.replace("gain: 0.05", "gain: 0.05, project_features: false")
    with pytest.raises(RecipeError, match=r"shape \(16, 8, 3, 3\) and, of the teacher, \(16, 12, 3, 3\)"):
        train(*make(text, Wide()), 1)


def test_self_is_the_model_of_the_beginning_and_resumes_exactly():
    whole = make(gmp() + DISTIL, "self")
    train(*whole, 8)
    saved = copy.deepcopy([part.state_dict() for part in whole])
    train(*whole, 7)
    model, optimizer, session = make(gmp() + DISTIL, "self", seed=3)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    session.load_state_dict(saved[2])
    train(model, optimizer, session, 7)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in whole[0].state_dict().items())


def test_without_a_teacher():
    with pytest.raises(RecipeError, match=r"DistillationModifier: needs a teacher: give a model, \"self\""):
        make(gmp() + DISTIL, None)
    _, _, session = make(gmp() + DISTIL, "disable")
    assert not session.changes_loss
    with pytest.raises(ValueError, match="teacher must be a model"):
        make(gmp() + DISTIL, "bert")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ("distill_output_keys: [start_logits]", "the outputs of the model are logits; no 'start_logits'"),
        ("teacher_input_keys: [pixels]", "the inputs are x; no 'pixels'"),
    ],
)
def test_outputs_that_are_not_there(fields, problem):
    model, _, session = make(gmp() + f"\n  - !DistillationModifier {{{fields}}}\n", "self")
    images, labels = batch(0)
    outputs = model(images)
    with pytest.raises(RecipeError, match=problem):
        session.loss(F.cross_entropy(outputs, labels), {"logits": outputs}, {"x": images})


def test_outputs_and_layers_ask_the_teacher_once():
    teacher = Network(seed=5)
    asked = []
    teacher.register_forward_hook(lambda *_: asked.append(1))
    model, optimizer, session = make(gmp() + DISTIL.replace("start_epoch: 1, end_epoch: 3", "") + LAYERS, teacher)
    train(model, optimizer, session, 3)
    assert len(asked) == 3

    def loss_of(text):
        model, _, session = make(gmp() + text, Network(seed=5))
        images, labels = batch(0)
        outputs = model(images)
        hard = F.cross_entropy(outputs, labels)
        return session.loss(hard, outputs, images).detach(), hard.detach()

    plain = DISTIL.replace("start_epoch: 1, end_epoch: 3", "")
    both, hard = loss_of(plain + LAYERS)
    torch.testing.assert_close(both, loss_of(plain)[0] + loss_of(LAYERS)[0] - hard)


def test_layers_that_take_another_form_are_heard_on():
    model, optimizer, session = make(gmp(end_epoch=1) + LAYERS, Network(seed=5))
    train(model, optimizer, session, 2 * STEPS)
    images, labels = batch(session.step)

    def taught():
        outputs = model(images)
        hard = F.cross_entropy(outputs, labels)
        return (session.loss(hard, outputs, images) - hard).detach()

    before = taught()
    assert before > 0
    with preserved_parameters(model, optimizer):
        convert(model, policy="always", masks=session.masks)
    session.rebind()
    assert native_layers(model)
    torch.testing.assert_close(taught(), before)
    train(model, optimizer, session, STEPS)
    session.finalize()
    assert not any(module._forward_hooks for module in model.modules())
