"""SWAT: what a layer computes, when weights and thresholds are chosen, and what it leaves behind."""

import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.densenet import DenseNet
from timm.models.vgg import VGG
from torch import nn

from sparse_ft import RecipeError, SparseSession
from sparse_ft.methods.swat import budgets
from sparse_ft.methods.swat.active import Active, Geometry, reached_taps
from sparse_ft.methods.swat.layers import State, SWATLayer, adapt, describe, restore, swat_layers
from sparse_ft.methods.swat.products import Products
from sparse_ft.ops.compact import largest_mask

sys.path.append(str(Path(__file__).parents[1] / "session"))

from loop import STEPS, batch, make, train, zeros

FIELDS = "params: ['conv.weight', 'hidden.weight'], sparsity: 0.75, start_epoch: 0, end_epoch: 4"


def recipe(fields):
    return f"modifiers:\n  - !SWATModifier {{{fields}}}\n"


def under_swat(layer, *, keep=0.25, kept_input=0.4, policy="always"):
    geometry = Geometry.of(layer)
    mask = largest_mask(layer.weight, round(keep * layer.weight.numel()))
    state = State(Products(geometry, policy, 10), Active(geometry, layer.weight, mask=mask), kept_input)
    adapt(layer, state)
    return state


def emulated(layer, mask, x, grad, kept_input):
    """Output and gradients of input, weight and bias in float64, by masks on dense operands."""

    def product(x, weight, bias):
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        if isinstance(layer.padding, str):
            return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    x, weight = x.detach().double().requires_grad_(), layer.weight.detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double().requires_grad_()
    y = product(x, weight * mask, bias)
    y.backward(grad.double())
    above = x.detach().abs() > x.detach().abs().flatten().sort(descending=True).values[int(kept_input * x.numel())]
    sparse, weight = x.detach() * above, weight.requires_grad_()
    product(sparse, weight, None).backward(grad.double())
    return y.detach(), x.grad, weight.grad, None if bias is None else bias.grad


LAYERS = {
    "conv": (lambda: nn.Conv2d(6, 20, 3, padding=1), (5, 6, 9, 7)),
    "stride": (lambda: nn.Conv2d(6, 20, 3, stride=2, padding=1, bias=False), (9, 6, 10, 11)),
    "pointwise": (lambda: nn.Conv2d(8, 12, 1), (3, 8, 5, 5)),
    "groups": (
        lambda: nn.Conv2d(6, 9, (3, 2), stride=(1, 2), padding=(0, 1), dilation=(2, 1), groups=3),
        (4, 6, 9, 8),
    ),
    "whole": (lambda: nn.Conv2d(5, 9, (3, 4), bias=False), (10, 5, 3, 4)),  # a linear layer in effect
    "same": (lambda: nn.Conv2d(4, 6, 4, padding="same"), (3, 4, 8, 8)),
    "linear": (lambda: nn.Linear(30, 17), (11, 30)),
    "tokens": (lambda: nn.Linear(12, 8, bias=False), (2, 5, 12)),
    "tiny": (lambda: nn.Conv2d(6, 20, 3, padding=1), (9, 6, 1, 1)),  # eight of nine taps read padding alone
    "tiny stride": (lambda: nn.Conv2d(6, 20, (3, 5), stride=2, padding=(1, 2)), (8, 6, 2, 3)),
}


@pytest.mark.parametrize("policy", ["always", "none"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_with_large_weights_and_large_inputs(kind, policy):
    torch.manual_seed(0)
    make_layer, shape = LAYERS[kind]
    layer, x = make_layer(), torch.randn(shape, requires_grad=True)
    state = under_swat(layer, policy=policy)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    mask = state.active.mask(layer.weight)
    want = emulated(layer, mask, x, grad, 0.4)
    for got, expected in zip((y, x.grad, layer.weight.grad, getattr(layer.bias, "grad", None)), want, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-4)
    assert layer.weight.grad[~mask].any()  # any weight may come to be used
    assert (state.kept, state.seen) == (int(0.4 * x.numel()), x.numel())


@pytest.mark.parametrize("policy", ["always", "none"])
def test_other_dtypes_are_computed_by_torch(policy):
    torch.manual_seed(0)
    layer, x = (
        nn.Conv2d(6, 20, 3, padding=1).double(),
        torch.randn(5, 6, 9, 7, dtype=torch.float64, requires_grad=True),
    )
    state = under_swat(layer, policy=policy)
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    want = emulated(layer, state.active.mask(layer.weight), x, grad, 0.4)
    assert all(
        torch.allclose(a, b) for a, b in zip((y, x.grad, layer.weight.grad, layer.bias.grad), want, strict=True)
    )


def test_a_norm_may_stand_right_before_a_convolution():
    def train_step(policy):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten()
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fields = f"params: ['2.weight'], sparsity: 0.5, start_epoch: 0, end_epoch: 2, policy: {policy}"
        session = SparseSession(model, recipe(fields), optimizer, 5)
        for _ in range(3):
            model(torch.randn(8, 3, 8, 8)).square().mean().backward()
            session.before_step()
            optimizer.step()
            session.after_step()
        return model.state_dict()

    sparse, dense = train_step("always"), train_step("none")
    assert all(torch.allclose(tensor, dense[name], rtol=1e-3, atol=1e-5) for name, tensor in sparse.items())


def test_of_inputs_that_are_zero_nothing_is_kept():
    layer, x = nn.Conv2d(4, 4, 3), torch.zeros(8, 4, 6, 6)
    x[:, :, 2:4] = torch.randn(8, 4, 2, 6)
    state = under_swat(layer, kept_input=0.8)
    layer(x).sum().backward()
    assert state.threshold == 0.0 and state.kept == int(torch.count_nonzero(x))


def test_equal_inputs_never_exceed_the_share():
    layer, x = nn.Conv2d(4, 4, 3), torch.ones(8, 4, 6, 6)
    x[:2] = 2.0
    state = under_swat(layer, kept_input=0.5)
    layer(x).sum().backward()
    assert state.kept == int((x == 2).sum())


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_reaches_the_gradients_that_it_reaches_in_torch(value):
    layer, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(8, 3, 6, 6)
    x[1, 2, 0, 0] = value
    state = under_swat(layer, kept_input=1.0)
    y = layer(x)
    y.backward(torch.ones_like(y))
    want = nn.Conv2d(3, 5, 3, padding=1, bias=False)
    want(x).backward(torch.ones_like(y))
    assert state.kept == x.numel() - 1 and want.weight.grad.isfinite().any()  # the least magnitude is left out
    assert torch.equal(layer.weight.grad.isfinite(), want.weight.grad.isfinite())


def test_taps_that_read_padding_alone_are_left_out_for_inputs_that_small():
    geometry = Geometry.of(nn.Conv2d(1, 1, 3, padding=1))
    assert reached_taps(geometry, 1, 1).tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert reached_taps(geometry, 1, 2).tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0]
    assert reached_taps(geometry, 2, 2) is None
    stride = Geometry.of(nn.Conv2d(1, 1, 3, stride=2, padding=1))
    assert reached_taps(stride, 2, 2).tolist() == [0, 0, 0, 0, 1, 1, 0, 1, 1]

    layer = nn.Conv2d(6, 20, 3, padding=1)
    state = under_swat(layer, policy="always")
    with torch.no_grad():
        small = layer(torch.randn(8, 6, 1, 1))
        assert state.active.used.values.numel() < int(state.active.mask(layer.weight).sum())
        x = torch.randn(8, 6, 5, 5)
        masked = F.conv2d(x, layer.weight * state.active.mask(layer.weight), layer.bias, padding=1)
        assert small.shape == (8, 20, 1, 1) and torch.allclose(layer(x), masked, atol=1e-5)


def test_a_weight_that_was_written_to_is_read_anew():
    for fused in (False, True):
        layer, x = nn.Linear(10, 6), torch.randn(4, 10)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=fused)
        geometry = Geometry.of(layer)
        mask = largest_mask(layer.weight, 20)
        for which in ({"mask": mask}, {"threshold": 0.1}, {"mask": mask, "threshold": 0.1}):
            active = Active(geometry, layer.weight, **which)
            adapt(layer, State(Products(geometry, "always", 10), active, 1.0))
            for _ in range(3):
                layer(x).square().sum().backward()
                optimizer.step()
                active.changed()  # torch's fused optimizers leave the version as it is
                optimizer.zero_grad()
                in_use = mask if which.keys() == {"mask"} else layer.weight.abs() >= 0.1
                want = F.linear(x, layer.weight * in_use, layer.bias)
                assert torch.allclose(layer(x), want, atol=1e-5)
            with torch.no_grad():
                layer.weight.mul_(2)
            assert active.operands(layer.weight, 1, 1).values.abs().max() == layer.weight.abs().max()
            restore(layer)


@pytest.mark.parametrize("between", ["threshold", "weights"])
@pytest.mark.parametrize("structure", ["unstructured", "channel"])
def test_a_sparse_start_does_not_let_in_every_weight(between, structure):
    model, optimizer, session = make(
        recipe(f"{FIELDS}, update_period: 6, policy: always, between: {between}, mask_type: {structure}")
    )
    with torch.no_grad():
        model.hidden.weight[:, 1:] = 0.0
        model.conv.weight[2:] = 0.0
        model.conv.bias.zero_() if model.conv.bias is not None else None
    parts = [model.conv, model.hidden]

    def note(step):
        for layer in parts:
            mask = layer.swat.active.mask(layer.weight)
            assert int(mask.sum()) <= 0.5 * mask.numel()

    train(model, optimizer, session, 12, each=note)


@pytest.mark.parametrize("scope", ["uniform", "momentum"])
def test_of_equal_weights_no_more_are_chosen_than_the_budget(scope):
    model, optimizer, session = make(recipe(f"{FIELDS}, update_period: 2, policy: always, scope: {scope}"))
    with torch.no_grad():
        model.hidden.weight.fill_(0.1)

    def note(step):
        if step == 0:
            state = model.hidden.swat  # as chosen, before the weights have changed
            assert int(state.active._mask.sum()) == model.hidden.weight.numel() // 4

    train(model, optimizer, session, 4, each=note)


def test_all_zero_weights_have_no_threshold():
    assert budgets.smallest_kept(torch.zeros(4, 4), 4, "unstructured") == float("inf")
    assert budgets.smallest_kept(torch.ones(4, 4), 0, "unstructured") == float("inf")
    weight = torch.tensor([[0.0, -2.0, 3.0, 0.0]])
    assert budgets.smallest_kept(weight, 3, "unstructured") == 2.0
    assert not budgets.at_least(weight, 0.0, "unstructured")[0, 0]


def _positions(used, weight):
    return used and torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, used.places(), True).view(
        weight.shape
    )


def _watched(fields, steps):
    """What stands after each step: the weights in use, their threshold, that of the inputs, the weights; and the
    positions that this step computed with, unless weights have just been chosen."""
    model, optimizer, session = make(recipe(f"{FIELDS}, update_period: 4, policy: always, {fields}"))
    seen = []

    def note(step):
        weight = model.hidden.weight.detach().clone()
        state = model.hidden.swat
        active, used = state.active, _positions(state.active.used, weight)
        seen.append((active.mask(model.hidden.weight), active.threshold, state.threshold, weight, used))

    train(model, optimizer, session, steps, each=note)
    return list(zip(*seen, strict=True))


@pytest.mark.parametrize("between", ["threshold", "weights"])
def test_thresholds_are_found_every_period(between):
    masks, used_from, thresholds, weights, _ = _watched(f"between: {between}", 17)
    for step in (4, 8, 12, 16):
        assert torch.equal(masks[step], largest_mask(weights[step], weights[step].numel() // 4))
    # That of inputs is found in the step after the choice, and in use until the next.
    assert [step for step in range(17) if thresholds[step] is None] == [0, 4, 8, 12, 16]
    assert all(thresholds[step] == thresholds[step + 1] for step in (1, 2, 5, 6, 9, 10))
    assert thresholds[3] != thresholds[5]
    if between == "threshold":
        assert [step for step in range(1, 17) if used_from[step] != used_from[step - 1]] == [4, 8, 12, 16]


def test_between_two_choices_the_threshold_stands():
    masks, used_from, _, weights, used = _watched("between: threshold", 17)
    for step, (mask, threshold, weight) in enumerate(zip(masks, used_from, weights, strict=True)):
        assert torch.equal(mask, weight.abs() >= threshold)
        assert (used[step] is None) == (step % 4 == 0)
        assert used[step] is None or torch.equal(used[step], masks[step - 1])
    assert sum(not torch.equal(masks[step], masks[step - 1]) for step in range(1, 17)) > 4


def test_or_the_weights_in_use_stand():
    masks, *_, used = _watched("between: weights", 17)
    assert all(torch.equal(used[step], masks[step]) for step in range(17) if step % 4)
    assert [step for step in range(1, 17) if not torch.equal(masks[step], masks[step - 1])] == [4, 8, 12, 16]


def test_masters_are_dense_until_the_end_and_pruned_then():
    model, optimizer, session = make(recipe(f"{FIELDS}, policy: always"))
    train(model, optimizer, session, 4 * STEPS - 1)
    assert zeros(model, "conv.weight", "hidden.weight") == 0.0 and not session.masks and not session.settled
    largest = largest_mask(model.hidden.weight, model.hidden.weight.numel() // 4)
    train(model, optimizer, session, 1)
    assert torch.equal(session.masks["hidden.weight"], largest) and session.settled
    assert type(model.conv) is nn.Conv2d and type(model.hidden) is nn.Linear and type(model.norm) is nn.BatchNorm2d


def test_a_training_that_stops_early_leaves_stock_layers(caplog):
    model, optimizer, session = make(recipe(f"{FIELDS}, policy: always"))
    train(model, optimizer, session, 7)
    session.finalize()
    assert "are to be pruned to a sparsity of 0.75" in caplog.text
    assert type(model.conv) is nn.Conv2d and not hasattr(model.conv, "swat") and type(model.norm) is nn.BatchNorm2d


@pytest.mark.parametrize("policy", ["always", "none"])
def test_evaluation_leaves_the_training_alone(policy):
    def run(evaluates):
        model, optimizer, session = make(recipe(f"{FIELDS}, update_period: 4, policy: {policy}"))

        def evaluate(step):
            if evaluates:
                state = model.conv.swat if step < 4 * STEPS - 1 else None
                before = None if state is None else (state.threshold, state.kept, state.active)
                model.eval()
                with torch.no_grad():
                    model(10 * batch(step)[0])
                model(10 * batch(step)[0]).sum().backward()  # a saliency map, say
                optimizer.zero_grad()
                model.train()
                with torch.no_grad():
                    model.conv(10 * model.stem(batch(step)[0]))
                assert state is None or before == (state.threshold, state.kept, state.active)

        train(model, optimizer, session, 4 * STEPS, each=evaluate)
        return model.state_dict()

    alone, watched = run(False), run(True)
    assert all(torch.equal(tensor, watched[name]) for name, tensor in alone.items())


def test_policies_agree():
    losses = {}
    for policy in ("always", "none", "auto"):
        model, optimizer, session = make(recipe(f"{FIELDS}, policy: {policy}"))
        train(model, optimizer, session, 12)
        images, labels = batch(0)
        losses[policy] = float(F.cross_entropy(model.eval()(images), labels).detach())
    assert losses["always"] == pytest.approx(losses["none"], rel=1e-3)
    assert losses["auto"] == pytest.approx(losses["none"], rel=1e-3)


class _TopK(torch.autograd.Function):
    """A convolution or linear layer as the paper has it, by masks on dense tensors."""

    @staticmethod
    def forward(ctx, x, weight, bias, product, weight_threshold, input_threshold):
        used = weight * (weight.abs() >= weight_threshold)
        ctx.save_for_backward(x * (x.abs() > input_threshold), used)
        ctx.product, ctx.shape = product, x.shape
        return product(x, used, bias)

    @staticmethod
    def backward(ctx, grad):
        kept, used = ctx.saved_tensors
        with torch.enable_grad():
            x, weight = torch.zeros_like(kept).requires_grad_(), torch.zeros_like(used).requires_grad_()
            (grad_x,) = torch.autograd.grad(ctx.product(x, used, None), x, grad)
            (grad_weight,) = torch.autograd.grad(ctx.product(kept, weight, None), weight, grad)
        return grad_x, grad_weight, grad.sum((0, *range(2, grad.dim()))), None, None, None


def test_a_training_is_that_of_a_plain_implementation():
    """Of the paper's algorithm, with everything else torch's own."""
    period, steps, share = 3, 14, 0.25

    def thresholds(layer, x=None):
        if x is None:
            weight = layer.weight.detach()
            return weight.abs().flatten().sort(descending=True).values[weight.numel() // 4 - 1]
        return x.abs().flatten().sort(descending=True).values[int(share * x.numel())]

    def product(layer):
        if isinstance(layer, nn.Linear):
            return F.linear
        return lambda x, weight, bias: F.conv2d(x, weight, bias, layer.stride, layer.padding)

    plain, optimizer, _ = make(recipe(FIELDS))
    layers = [plain.conv, plain.hidden]
    found: dict = {}

    def forward(step, images):
        def sparse(layer, x):
            if step == 0:
                return layer(x)  # the step at which it begins
            if (step - 1) % period == 0:
                found[layer, "input"] = thresholds(layer, x.detach())
            return _TopK.apply(
                x, layer.weight, layer.bias, product(layer), found[layer, "weight"], found[layer, "input"]
            )

        x = F.relu(plain.norm(sparse(plain.conv, F.relu(plain.stem(images)))))
        return plain.head(F.relu(sparse(plain.hidden, x.flatten(1))))

    for step in range(steps):
        images, labels = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(forward(step, images), labels).backward()
        if step > 0:
            optimizer.step()
        if step % period == 0:
            found |= {(layer, "weight"): thresholds(layer) for layer in layers}
        if step == 0:  # it begins before the weights change
            optimizer.step()

    model, optimizer, session = make(recipe(f"{FIELDS}, update_period: {period}, policy: always"))
    train(model, optimizer, session, steps)
    for name, want in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], want, rtol=1e-3, atol=1e-5, msg=name)


def test_accumulated_batches_share_one_threshold():
    model, optimizer, session = make(recipe(f"{FIELDS}, policy: always"))
    train(model, optimizer, session, 1)
    thresholds = []
    for step in (0, 1):
        images, labels = batch(step)
        F.cross_entropy(model(images), labels).backward()
        thresholds.append(model.conv.swat.threshold)
    assert thresholds[0] is not None and thresholds[0] == thresholds[1]


def networks():
    yield "resnet", timm.create_model("test_resnet", num_classes=4)
    yield (
        "wide_resnet",
        timm.models.ResNet(
            timm.models.resnet.Bottleneck,
            (1, 1, 1, 1),
            channels=(8, 8, 16, 16),
            base_width=128,
            num_classes=4,
            stem_width=8,
        ),
    )
    yield "vgg", VGG([8, "M", 16, "M", 16, "M"], num_classes=4, norm_layer=nn.BatchNorm2d)
    yield "densenet", DenseNet(growth_rate=8, block_config=(2, 2), num_classes=4)


@pytest.mark.parametrize("name", ["resnet", "wide_resnet", "vgg", "densenet"])
def test_networks_of_timm_train(name):
    torch.manual_seed(0)
    model = dict(networks())[name]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    fields = "params: __ALL_PRUNABLE__, sparsity: 0.8, start_epoch: 0, end_epoch: 2, update_period: 3, policy: always"
    session = SparseSession(model, recipe(fields), optimizer, 10, total_steps=20)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    images += labels.view(-1, 1, 1, 1)
    losses = []
    for step in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        session.before_step()
        optimizer.step()
        session.after_step()
        losses.append(loss.item())
        if step == 5:
            layers = swat_layers(model)
            convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
            assert convolutions[0] not in layers and set(convolutions[1:]) <= set(layers)
            used = [layer.swat.products.operations for layer in layers.values()]
            done = sum(each.forward + each.input_grad + each.weight_grad for each in used)
            # Weights come into use between two choices.
            assert 0.15 < done / sum(each.dense for each in used) < 0.22
            assert all(name in describe(model) for name in layers)
    assert losses[-1] < 0.97 * losses[0]
    report = session.finalize()
    assert report.layers[0].nnz == report.layers[0].numel
    pruned = [layer for layer in report.layers if layer.nnz < layer.numel]
    assert sum(layer.nnz for layer in pruned) == pytest.approx(
        0.2 * sum(layer.numel for layer in pruned), abs=len(pruned)
    )


def test_erk_takes_the_first_convolution_too():
    model, optimizer, session = make(
        recipe(
            "params: __ALL_PRUNABLE__, sparsity: 0.75, start_epoch: 0, end_epoch: 4, scope: erk, policy: none,"
            " between: weights"
        )
    )
    train(model, optimizer, session, 2)
    parts = [model.stem, model.conv, model.hidden, model.head]
    sizes = [layer.weight.numel() for layer in parts]
    masks = [p.swat.active.mask(p.weight) if isinstance(p, SWATLayer) else torch.ones_like(p.weight) for p in parts]
    kept = [int(mask.sum()) for mask in masks]
    assert sum(kept) == sum(sizes) - round(0.75 * sum(sizes))
    assert kept[2] / sizes[2] < kept[1] / sizes[1]


def test_budget_by_momentum_goes_where_momentum_is_large():
    kept = budgets.momentum({"a": 3.0, "b": 1.0, "c": 1.0}, {"a": 1000, "b": 1000, "c": 1000}, 500)
    assert kept == {"a": 300, "b": 100, "c": 100}
    capped = budgets.momentum({"a": 8.0, "b": 1.0, "c": 1.0}, {"a": 100, "b": 1000, "c": 1000}, 501)
    assert capped["a"] == 99 and sum(capped.values()) == 501 and abs(capped["b"] - capped["c"]) <= 1
    assert sum(budgets.momentum({"a": 0.0, "b": 0.0}, {"a": 10, "b": 90}, 40).values()) == 40


def test_momentum_needs_an_optimizer_that_has_one():
    model, _, _ = make(recipe(FIELDS))
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    session = SparseSession(model, recipe(f"{FIELDS}, scope: momentum, update_period: 1, policy: none"), plain, STEPS)
    with pytest.raises(RecipeError, match="needs an optimizer with momentum"):
        train(model, plain, session, 3)


@pytest.mark.parametrize(("structure", "dims"), [("channel", (2, 3)), ("filter", (1, 2, 3))])
def test_structures_are_chosen_whole_by_their_sum(structure, dims):
    weight = torch.randn(6, 5, 3, 3)
    mask = budgets.active_mask(weight, weight.numel() // 3, structure)
    counts = mask.sum(dims)
    assert set(counts.flatten().tolist()) == {0, weight.numel() // counts.numel()}
    sums = weight.abs().sum(dims)
    assert sums[counts > 0].min() > sums[counts == 0].max()
    linear = torch.randn(6, 5)
    assert torch.equal(budgets.active_mask(linear, 10, structure), largest_mask(linear, 10))


def test_restored_layers_are_what_they_were():
    layer = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 5, 5)
    want, keys = layer(x), list(layer.state_dict())
    under_swat(layer)
    assert list(layer.state_dict()) == keys and not torch.equal(layer(x), want)
    restore(layer)
    assert torch.equal(layer(x), want) and vars(layer).keys() == vars(nn.Conv2d(3, 4, 3)).keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("params: ['norm.weight'], sparsity: 0.5, start_epoch: 0, end_epoch: 4", "norm.weight cannot train with SWAT"),
        (
            "params: ['conv.bias'], sparsity: 0.5, start_epoch: 0, end_epoch: 4",
            "conv.bias is not the weight of a layer",
        ),
        ("params: [conv], sparsity: 0.5, start_epoch: 0, end_epoch: -1", "must be an epoch after start_epoch"),
        ("params: [conv], sparsity: 0.5, start_epoch: 0, end_epoch: 4, update_period: 0", "at least 1"),
        ("params: [conv], sparsity: 1.0, start_epoch: 0, end_epoch: 4", "below 1"),
    ],
)
def test_what_is_wrong_is_said(fields, message):
    with pytest.raises(RecipeError, match=message):
        make(recipe(fields))
