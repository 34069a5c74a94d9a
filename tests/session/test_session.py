"""What a session does to weights, gradients and optimizer."""

import copy

import pytest
import torch
import torch.nn.functional as F
from loop import OPTIMIZERS, PRUNABLE, STEPS, Network, batch, gmp, make, train, zeros
from torch import nn

import sparse_ft
from sparse_ft import Recipe, RecipeError, SparseSession
from sparse_ft.optimizer_state import elementwise_state


def recipe(*modifiers):
    return "modifiers:\n" + "".join(f"  - {modifier}\n" for modifier in modifiers)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masks_stand_still_between_updates_and_hold_everything(optimizer):
    model, made, session = make(gmp(inter_func="linear"), optimizer=optimizer)
    seen = []

    def check(step):
        masks = session.masks
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            assert not weight[~mask].any()
            assert not weight.grad[~mask].any()
            for key, state in elementwise_state(made, weight):
                assert not state[~mask].any(), key
                assert state[mask].any()
        seen.append({name: mask.clone() for name, mask in masks.items()})

    train(model, made, session, 4 * STEPS, each=check)
    updates = [
        step
        for step in range(1, 4 * STEPS)
        if any(not torch.equal(seen[step][n], seen[step - 1][n]) for n in seen[step])
    ]
    assert updates == [2, 4, 6, 8, 10, 12, 14, 15]
    for name in ("conv.weight", "hidden.weight"):
        numel = model.get_parameter(name).numel()
        assert int((~session.masks[name]).sum()) == round(0.8 * numel)
        assert all((seen[i][name] | ~seen[i + 1][name]).all() for i in range(len(seen) - 1))  # nothing comes back


def test_clipping_sees_masked_gradients():
    model, made, session = make(gmp(update_frequency=1))
    train(model, made, session, 3)
    made.zero_grad()
    images, labels = batch(3)
    nn.functional.cross_entropy(model(images), labels).backward()
    for name, mask in session.masks.items():
        assert not model.get_parameter(name).grad[~mask].any()


def test_the_target_is_reached_by_the_end_of_training():
    model, made, session = make(gmp(end_epoch=4, update_frequency=1))
    train(model, made, session, 4 * STEPS)
    assert int((model.hidden.weight == 0).sum()) == round(0.8 * model.hidden.weight.numel())


def test_a_training_that_ends_early_is_warned_of(caplog):
    model, made, session = make(gmp(), epochs=1)
    train(model, made, session, STEPS)
    report = session.finalize()
    assert "training ended at epoch 1, but the final sparsity of 0.8 is due at epoch 3" in caplog.text
    assert 0.1 < report.overall < 0.7


def test_a_finished_session_lets_go_quietly(caplog):
    model, made, session = make(gmp())
    train(model, made, session, 4 * STEPS)
    session.finalize()
    assert "training ended" not in caplog.text
    assert session.masks == {}
    assert zeros(model, "hidden.weight") == pytest.approx(0.8, abs=1e-3)
    assert not model.hidden.weight._post_accumulate_grad_hooks


def test_budgets():
    numel = {name: Network().get_parameter(name).numel() for name in PRUNABLE}
    ignoring = {"params": "__ALL_PRUNABLE__", "ignore": "[stem, 're:head']", "final_sparsity": 0.7}
    for scope in ("uniform", "erk", "global"):
        model, made, session = make(gmp(**ignoring, scope=scope))
        train(model, made, session, 4 * STEPS)
        assert not zeros(model, "stem.weight", "head.weight")
        both = [round(zeros(model, name) * numel[name]) for name in ("conv.weight", "hidden.weight")]
        assert sum(both) == pytest.approx(0.7 * (numel["conv.weight"] + numel["hidden.weight"]), abs=1)
        if scope != "uniform":
            assert both[0] / numel["conv.weight"] < 0.69


def test_a_sparsity_for_each_weight():
    final = "{0.5: [conv.weight], 0.9: ['re:hid.*weight']}"
    model, made, session = make(gmp(params="[]", final_sparsity=final))
    train(model, made, session, 4 * STEPS)
    assert zeros(model, "conv.weight") == pytest.approx(0.5, abs=1e-3)
    assert zeros(model, "hidden.weight") == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("structure", ["'2:4'", "block4", "[2, 4]"])
def test_structures(structure):
    start = {"init_sparsity": 0.5} if structure == "'2:4'" else {}
    model, made, session = make(gmp(params="['hidden.weight']", final_sparsity=0.5, mask_type=structure, **start))
    train(model, made, session, 4 * STEPS)
    kept = (model.hidden.weight != 0).view(24, 18, 4)
    assert zeros(model, "hidden.weight") == pytest.approx(0.5, abs=0.01)
    if structure == "'2:4'":
        assert (kept.sum(-1) == 2).all()
    else:
        assert set(kept.sum(-1).unique().tolist()) == {0, 4}


def test_sparsity_from_the_weights():
    torch.manual_seed(0)
    model = Network()
    sparse_ft.prune(model, {"hidden": 0.6})
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    session = SparseSession(model, gmp(init_sparsity="__FROM_PARAM__", params="['hidden.weight']"), optimizer, STEPS)
    train(model, optimizer, session, 1)
    assert zeros(model, "hidden.weight") == pytest.approx(0.6, abs=1e-3)


def test_revived_weights_start_clean():
    falling = gmp(params="['hidden.weight']", init_sparsity=0.8, final_sparsity=0.3, inter_func="linear")
    model, made, session = make(falling, optimizer="adamw")
    before = {}

    def check(step):
        mask = session.masks["hidden.weight"]
        revived = mask & ~before.get("mask", mask)
        for _, state in elementwise_state(made, model.hidden.weight):
            assert not state[~mask].any()
            assert not state[revived].isnan().any()
        before["mask"] = mask

    train(model, made, session, 4 * STEPS, each=check)
    assert int((~session.masks["hidden.weight"]).sum()) == round(0.3 * model.hidden.weight.numel())


def test_constant_pruning_keeps_an_active_zero():
    model = Network()
    sparse_ft.prune(model, {"hidden": 0.6})
    pruned = model.hidden.weight == 0
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    session = SparseSession(model, recipe("!ConstantPruningModifier {params: __ALL_PRUNABLE__}"), optimizer, STEPS)
    train(model, optimizer, session, 1)
    kept = session.masks["hidden.weight"].nonzero()[0]
    with torch.no_grad():
        model.hidden.weight[tuple(kept)] = 0.0
    train(model, optimizer, session, 3)
    assert model.hidden.weight[tuple(kept)] != 0
    assert torch.equal(model.hidden.weight == 0, pruned)
    assert list(session.masks) == ["hidden.weight"]  # what has no zeros trains freely


def test_constant_pruning_leaves_a_new_head_alone():
    model = Network()
    nn.init.zeros_(model.head.weight)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    session = SparseSession(model, recipe("!ConstantPruningModifier {params: __ALL_PRUNABLE__}"), optimizer, STEPS)
    train(model, optimizer, session, 2)
    assert model.head.weight.any()


def test_constant_pruning_of_native_layers():
    model = Network()
    sparse_ft.prune(model, {"hidden": 0.8})
    sparse_ft.convert(model, policy="always")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    constant = "!ConstantPruningModifier {params: __ALL_PRUNABLE__}"
    train(model, optimizer, SparseSession(model, recipe(constant), optimizer, STEPS), 2)
    with pytest.raises(RecipeError, match="hidden.weight belongs to a native sparse layer"):
        train(model, optimizer, SparseSession(model, gmp(params="['hidden.weight']"), optimizer, STEPS), 1)


def test_two_modifiers_on_one_weight():
    both = (
        gmp(params="['hidden.weight']", end_epoch=1).rstrip()
        + "\n  - !ConstantPruningModifier\n    params: [hidden]\n"
    )
    model, made, session = make(both + "    start_epoch: 2\n")
    train(model, made, session, 4 * STEPS)
    assert zeros(model, "hidden.weight") == pytest.approx(0.8, abs=1e-3)


def test_acdc_alternates_and_ends_sparse():
    fields = "compression_sparsity: 0.8, start_epoch: 1, end_epoch: 6, update_frequency: 1, params: [hidden]"
    acdc = f"!ACDCPruningModifier {{{fields}}}"
    model, made, session = make(recipe(acdc), epochs=7)
    history = []
    train(model, made, session, 7 * STEPS, each=lambda step: history.append(round(zeros(model, "hidden.weight"), 2)))
    per_epoch = [history[i * STEPS : (i + 1) * STEPS] for i in range(7)]
    assert per_epoch[0] == per_epoch[1] == [0.0] * STEPS
    assert per_epoch[2] == per_epoch[4] == [0.8] * STEPS
    assert max(per_epoch[3]) < 0.2  # units that are off stay where they were
    assert per_epoch[5] == per_epoch[6] == [0.8] * STEPS


def test_learning_rate_and_weight_decay():
    text = recipe(
        "!SetLearningRateModifier {learning_rate: 0.5}",
        "!LearningRateFunctionModifier {lr_func: linear, init_lr: 0.4, final_lr: 0.0, start_epoch: 1, end_epoch: 2}",
        "!SetWeightDecayModifier {weight_decay: 0.25, start_epoch: 1, param_groups: [0]}",
    )
    model, made, session = make(text)
    rates, decays = [], []

    def note(step):
        rates.append(made.param_groups[0]["lr"])
        decays.append(made.param_groups[0]["weight_decay"])

    train(model, made, session, 3 * STEPS, each=note)
    assert rates[:STEPS] == [0.5] * STEPS
    assert rates[STEPS : 2 * STEPS] == pytest.approx([0.4, 0.32, 0.24, 0.16, 0.08])
    assert rates[2 * STEPS :] == [0.0] * STEPS
    assert decays == [1e-4] * STEPS + [0.25] * 2 * STEPS


def test_groups_that_are_not_there():
    model, made, session = make(recipe("!SetLearningRateModifier {learning_rate: 0.5, param_groups: [3]}"))
    with pytest.raises(RecipeError, match="SetLearningRateModifier.param_groups: the optimizer has 1 parameter"):
        train(model, made, session, 1)


def test_trainable_params():
    text = recipe("!TrainableParamsModifier {params: ['re:hidden'], trainable: false, start_epoch: 1, end_epoch: 2}")
    model, made, session = make(text)
    history = []
    train(model, made, session, 3 * STEPS, each=lambda step: history.append(model.hidden.weight.detach().clone()))
    moved = [not torch.equal(a, b) for a, b in zip(history, history[1:], strict=False)]
    assert moved[: STEPS - 1] == [True] * (STEPS - 1)
    assert moved[STEPS - 1 : 2 * STEPS] == [False] * (STEPS + 1)
    assert all(moved[2 * STEPS :])
    assert model.hidden.weight.requires_grad


def test_set_and_gradual_params():
    text = recipe(
        "!SetParamModifier {params: [head.bias], val: [1, 2, 3, 4], start_epoch: 1}",
        "!TrainableParamsModifier {params: [head.bias, norm.bias], trainable: false}",
        "!GradualParamModifier {params: [norm.bias], init_val: 0, final_val: 1, start_epoch: 0, end_epoch: 2,"
        " update_frequency: 1, inter_func: cubic}",
    )
    model, made, session = make(text)
    values = []
    train(model, made, session, 3 * STEPS, each=lambda step: values.append(float(model.norm.bias[0])))
    assert values == pytest.approx([0.0] * STEPS + [0.875] * STEPS + [1.0] * STEPS)
    assert model.head.bias.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("params", "problem"),
    [
        (
            "[hiden.weight]",
            r"line 3: GMPruningModifier.params: 'hiden.weight' matches no parameter of the model; names",
        ),
        ("['re:nothing']", "matches no parameter"),
    ],
)
def test_names_are_checked_at_once(params, problem):
    with pytest.raises(RecipeError, match=problem):
        make(gmp(params=params))


def test_usual_exceptions_are_named(caplog):
    model, made, session = make(gmp(params="__ALL_PRUNABLE__"))
    train(model, made, session, 1)
    assert "stem.weight (stem)" in caplog.text
    assert "head.weight (classifier head)" in caplog.text


def test_names_of_a_wrapped_model():
    for params in ("[module.hidden.weight]", "['re:module.hid.*weight']", "[hidden]"):
        model = Network()
        wrapped = nn.DataParallel(model)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        session = SparseSession(wrapped, gmp(params=params), optimizer, STEPS)
        train(model, optimizer, session, 1)
        assert list(session.masks) == ["hidden.weight"]


def test_an_average_of_the_weights_is_masked():
    model, made, session = make(gmp())
    average = copy.deepcopy(model)
    train(model, made, session, 4 * STEPS)
    session.apply_masks(average)
    assert torch.equal(average.hidden.weight == 0, model.hidden.weight == 0)


def test_order_of_calls():
    model, made, session = make(gmp())
    with pytest.raises(RuntimeError, match="without before_step"):
        session.after_step()
    session.before_step()
    with pytest.raises(RuntimeError, match="called twice"):
        session.before_step()
    with pytest.raises(RuntimeError, match="not in the middle"):
        session.state_dict()


def test_one_recipe_for_two_sessions():
    shared = Recipe.load(gmp())
    one, two = make(shared), make(shared)
    train(*one, 4 * STEPS)
    train(*two, 4 * STEPS)
    assert torch.equal(one[0].hidden.weight, two[0].hidden.weight)


def test_a_dense_model_is_left_as_it_is():
    model, made, session = make(recipe("!EpochRangeModifier {start_epoch: 0, end_epoch: 4}"))
    train(model, made, session, 3)
    assert session.max_epochs == 4
    plain = Network()
    optimizer = OPTIMIZERS["sgd"](plain.parameters())
    for step in range(3):
        images, labels = batch(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(images), labels).backward()
        optimizer.step()
    assert torch.equal(plain.hidden.weight, model.hidden.weight)


def test_a_state_of_something_else_is_refused():
    model, made, session = make(gmp())
    train(model, made, session, 3)
    state = session.state_dict()
    _, _, other = make(recipe("!EpochRangeModifier {start_epoch: 0, end_epoch: 4}"))
    with pytest.raises(RecipeError, match="of a recipe with the modifiers GMPruningModifier"):
        other.load_state_dict(state)
    state["masks"] = {name: mask[:2] for name, mask in state["masks"].items()}
    with pytest.raises(RecipeError, match=r"GMPruningModifier: the state has a mask of conv.weight of shape"):
        make(gmp())[2].load_state_dict(state)


def test_a_recipe_that_has_changed_a_number_goes_on():
    model, made, session = make(gmp())
    train(model, made, session, 3)
    other, optimizer, changed = make(gmp(final_sparsity=0.9))
    other.load_state_dict(model.state_dict())
    optimizer.load_state_dict(made.state_dict())
    changed.load_state_dict(session.state_dict())
    train(other, optimizer, changed, 4 * STEPS - 3)
    assert zeros(other, "hidden.weight") == pytest.approx(0.9, abs=1e-3)


def test_a_pruned_weight_that_is_thawed_is_held_as_well():
    text = (
        gmp(params="[hidden]")
        + "  - !TrainableParamsModifier {params: [hidden.weight], trainable: false, end_epoch: 2}\n"
    )
    model, made, session = make(text)

    def check(step):
        for name, mask in session.masks.items():
            assert not model.get_parameter(name)[~mask].any()
            for _, state in elementwise_state(made, model.get_parameter(name)):
                assert not state[~mask].any()

    model.hidden.weight.requires_grad_(False)
    train(model, made, session, 4 * STEPS, each=check)


def test_infinite_gradients_of_pruned_weights_do_no_harm():
    model, made, session = make(gmp(params="[hidden]"))
    train(model, made, session, 1)
    pruned = ~session.masks["hidden.weight"]
    made.zero_grad()
    loss = (model.hidden.weight * torch.where(pruned, torch.inf, 1.0)).nan_to_num(0).sum()
    loss.backward()
    session.before_step()
    made.step()
    session.after_step()
    assert model.hidden.weight.isfinite().all()
    assert not model.hidden.weight[pruned].any()


def test_gradients_that_a_method_watches_stay_masked():
    """Clipping has to see the same norm at a step that looks at pruned weights as at any other."""
    rigl = (
        "modifiers:\n  - !RigLPruningModifier {params: ['conv.weight', 'hidden.weight'], final_sparsity: 0.75,"
        " start_epoch: 0, end_epoch: 3, update_frequency: 0.6, num_grads: 2}\n"
    )
    model, optimizer, session = make(rigl)
    watched = 0
    for step in range(4 * STEPS):
        optimizer.zero_grad()
        for images, labels in zip(*(each.split(8) for each in batch(step)), strict=True):
            (F.cross_entropy(model(images), labels) / 2).backward()
        masks = session.training.masks
        for name, mask in session.masks.items():
            gradient = model.get_parameter(name).grad
            assert not gradient[~mask].any()
            if masks.watched:
                whole = dict(zip(masks.names(), whole_gradients(model, batch(step), masks.names()), strict=True))
                torch.testing.assert_close(masks.gradient(name), whole[name])
        watched += masks.watched
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        session.before_step()
        optimizer.step()
        session.after_step()
    assert 4 < watched < 12


def whole_gradients(model, data, names):
    """Those of the whole batch, with the running statistics left alone."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weights = [model.get_parameter(name) for name in names]
    losses = [
        F.cross_entropy(model(images), labels) / 2 for images, labels in zip(*(d.split(8) for d in data), strict=True)
    ]
    gradients = torch.autograd.grad(sum(losses), weights)
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])
    return gradients


ONE_SHOT = """
oneshot_stage:
  pruning_modifiers:
    MagnitudePruningModifier: {init_sparsity: 0.0, final_sparsity: 0.7, targets: ['re:hidden.weight', conv.weight]}
train_stage:
  run_type: train
  pruning_modifiers:
    ConstantPruningModifier: {targets: __ALL_PRUNABLE__, start: 0}
"""


def test_a_one_shot_stage_prunes_at_the_first_step():
    model, optimizer, session = make(ONE_SHOT, epochs=2)
    assert session.max_epochs == 0
    train(model, optimizer, session, 1)
    assert zeros(model, "conv.weight", "hidden.weight") == pytest.approx(0.7, abs=1e-3)
    mask = session.masks["hidden.weight"].clone()
    train(model, optimizer, session, 2 * STEPS - 1)
    assert torch.equal(session.masks["hidden.weight"], mask)
    assert Recipe.load(Recipe.load(ONE_SHOT).dump()) == Recipe.load(ONE_SHOT)
    with pytest.raises(RecipeError, match="has the one-shot stage 'oneshot_stage', which only mappings can say"):
        Recipe.load(ONE_SHOT).to_flat()


def test_a_recipe_is_applied_without_training():
    model = Network()
    before = copy.deepcopy(model.state_dict())
    report = sparse_ft.apply_recipe(model, ONE_SHOT)
    assert {layer.name for layer in report.layers if layer.sparsity > 0} == {"conv", "hidden"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor[tensor != 0], before[name][tensor != 0])
    sparse_ft.apply_recipe(model, gmp(final_sparsity=0.9))  # all of a recipe without such a stage
    assert zeros(model, "conv.weight") == pytest.approx(0.9, abs=0.01)
    later = "start_epoch: 2, end_epoch: 9, update_frequency: 1"
    sparse_ft.apply_recipe(
        model, recipe(f"!ACDCPruningModifier {{params: [hidden], compression_sparsity: 0.95, {later}}}")
    )
    assert zeros(model, "hidden.weight") == pytest.approx(0.95, abs=0.01)
    fields = f"params: [head], init_sparsity: 0.1, final_sparsity: 0.5, {later}"
    with pytest.raises(RecipeError, match="needs a grad_sampler"):
        sparse_ft.apply_recipe(model, recipe(f"!OBSPruningModifier {{{fields}, num_grads: 4}}"))
    with pytest.raises(RecipeError, match="line 2: MovementPruningModifier: prunes by what training shows"):
        sparse_ft.apply_recipe(model, recipe(f"!MovementPruningModifier {{{fields}}}"))
    with pytest.raises(RecipeError, match="prunes nothing"):
        sparse_ft.apply_recipe(model, recipe("!EpochRangeModifier {start_epoch: 0, end_epoch: 2}"))
