"""Layers that change their form while they train are the same to the recipe, the optimizer and the results."""

import pytest
import torch
from loop import OPTIMIZERS, STEPS, batch, make, train

from sparse_ft.live import LiveForms, native_layers
from sparse_ft.optimizer_state import elementwise_state

TARGETS = "params: ['conv.weight', 'hidden.weight']"
METHODS = {
    "gmp": f"!GMPruningModifier {{{TARGETS}, init_sparsity: 0.6, final_sparsity: 0.8, start_epoch: 1, end_epoch: 5,"
    " update_frequency: 2}",
    "rigl": f"!RigLPruningModifier {{{TARGETS}, final_sparsity: 0.8, start_epoch: 0, end_epoch: 6,"
    " update_frequency: 2}",
    "acdc": f"!ACDCPruningModifier {{{TARGETS}, compression_sparsity: 0.8, start_epoch: 0, end_epoch: 8,"
    " update_frequency: 2}",
    "often": f"!GMPruningModifier {{{TARGETS}, init_sparsity: 0.6, final_sparsity: 0.8, start_epoch: 0, end_epoch: 5,"
    " update_frequency: 0.2}",
    "movement": f"!MovementPruningModifier {{{TARGETS}, init_sparsity: 0.6, final_sparsity: 0.8, start_epoch: 0,"
    " end_epoch: 5, update_frequency: 2}",
}
EPOCHS = 8


def run(method, optimizer, live):
    model, made, session = make(f"modifiers:\n  - {METHODS[method]}\n", epochs=EPOCHS, optimizer=optimizer)
    forms = LiveForms(session, {}, lambda: batch(0)[0], policy="always") if live else None
    native = []

    def each(step):
        if forms is not None:
            made.zero_grad()
            forms.follow()
        native.append(native_layers(model))

    train(model, made, session, EPOCHS * STEPS, each=each)
    return model, made, session, native


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_results_are_those_of_masked_dense_training(method, optimizer):
    model, made, session, native = run(method, optimizer, live=True)
    plain, plain_made, plain_session, never = run(method, optimizer, live=False)
    assert native[-1] == ["conv", "hidden"]
    assert not any(never)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    assert session.masks.keys() == plain_session.masks.keys()
    for name, mask in session.masks.items():
        assert torch.equal(mask, plain_session.masks[name])
        sparse = model.get_submodule(name.removesuffix(".weight"))
        ours = dict(elementwise_state(made, sparse.weight))
        for key, theirs in elementwise_state(plain_made, plain.get_parameter(name)):
            torch.testing.assert_close(sparse.pattern.to_dense(ours[key]), theirs, rtol=1e-3, atol=1e-4)
    changes = sum(a != b for a, b in zip(native, native[1:], strict=False))
    if method in ("often", "movement"):
        assert changes == 1  # when all is settled
    else:
        assert changes > 3


def test_the_optimizer_has_every_parameter_once():
    model, made, _, _ = run("gmp", "adamw", live=True)
    current = [id(parameter) for parameter in model.parameters()]
    assert [id(p) for group in made.param_groups for p in group["params"]] == current
    assert {id(parameter) for parameter in made.state} == set(current)


def test_sparsity_and_masks_are_those_of_native_layers():
    _, _, session, _ = run("gmp", "sgd", live=True)
    layers = {layer.name: layer for layer in session.finalize().layers}
    assert layers["hidden"].sparsity == pytest.approx(0.8, abs=1e-3)
