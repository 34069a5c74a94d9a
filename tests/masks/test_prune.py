import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import sparse_ft
from sparse_ft.masks import compute_masks, mask_state, prunable_layers, prune, sparsity
from sparse_ft.masks.prune import keep_highest


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)))


def zeros(model: nn.Module) -> dict[str, int]:
    return {layer.name: layer.numel - layer.nnz for layer in sparsity(model).layers}


widths = st.lists(st.integers(1, 20), min_size=2, max_size=5)
fractions = st.floats(0, 0.999)


@given(widths, fractions)
@settings(deadline=None)
def test_uniform_is_exact_per_layer(widths, fraction):
    model = mlp(*widths)
    prune(model, fraction, ignore=[])
    assert zeros(model) == {str(i): round(layer.weight.numel() * fraction) for i, layer in enumerate(model)}


@pytest.mark.parametrize("scope", ["erk", "global"])
@given(widths=widths, fraction=fractions)
@settings(deadline=None)
def test_erk_and_global_are_exact_in_total(scope, widths, fraction):
    model = mlp(*widths)
    report = prune(model, fraction, scope=scope, ignore=[])
    assert report.numel - report.nnz == round(report.numel * fraction)


@pytest.mark.parametrize("scope", ["uniform", "erk", "global"])
@pytest.mark.parametrize("structure", ["unstructured", "block_2x2", "filter"])
@given(widths=widths, low=fractions, high=fractions)
@settings(deadline=None, max_examples=30)
def test_pruning_further_only_adds_zeros(scope, structure, widths, low, high):
    low, high = sorted((low, high))
    model = mlp(*widths)
    prune(model, low, scope=scope, structure=structure, ignore=[])
    before = {name: weight == 0 for name, weight in model.state_dict().items()}
    once = mlp(*widths)
    once.load_state_dict(model.state_dict())
    prune(model, high, scope=scope, structure=structure, ignore=[])
    after = {name: weight == 0 for name, weight in model.state_dict().items()}
    assert all(bool((after[name] | ~before[name]).all()) for name in before)
    if structure == "unstructured":
        prune(once, high, scope=scope, ignore=[])
        assert all(torch.equal(once.state_dict()[name], value) for name, value in model.state_dict().items())


def test_magnitude_keeps_the_largest():
    linear = nn.Linear(4, 2)
    linear.weight.data = torch.tensor([[0.1, -3.0, 0.2, 2.0], [-0.3, 0.0, 5.0, -1.0]])
    prune(linear, 0.5)
    assert linear.weight.tolist() == [[0.0, -3.0, 0.0, 2.0], [0.0, 0.0, 5.0, -1.0]]


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_ties_go_in_index_order(scope):
    model = mlp(3, 4)
    model[0].weight.data = torch.tensor([1.0, -1.0]).repeat(6).view(4, 3)
    prune(model, 5 / 12, scope=scope)
    assert (model[0].weight == 0).flatten().tolist() == [True] * 5 + [False] * 7


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.data())
def test_keep_highest_equals_a_stable_sort(values, data):
    count = data.draw(st.integers(0, len(values)))
    expected = [True] * len(values)
    for index in sorted(range(len(values)), key=values.__getitem__)[:count]:
        expected[index] = False
    scores = torch.tensor(values, dtype=torch.float32)
    assert keep_highest(scores, count).tolist() == expected
    assert keep_highest(scores, count, torch.ones(len(values), dtype=torch.int64)).tolist() == expected


def test_groups_reach_the_nearest_count():
    sizes = torch.tensor([4, 4, 4, 2])
    scores = torch.tensor([1.0, 2.0, 3.0, 0.0])
    kept = {target: int(sizes[keep_highest(scores, target, sizes)].sum()) for target in range(15)}
    assert kept == {0: 14, 1: 14, 2: 12, 3: 12, 4: 12} | {5: 8, 6: 8, 7: 8, 8: 8} | {
        9: 4, 10: 4, 11: 4, 12: 4, 13: 0, 14: 0
    }  # fmt: skip


def test_weights_of_half_precision_and_infinite_weights():
    model = mlp(8, 8, 2).to(torch.bfloat16)
    model[0].weight.data[0, 0] = torch.inf
    prune(model, 0.5)
    assert model[0].weight[0, 0] == torch.inf
    assert zeros(model) == {"0": 32, "1": 0}
    assert not torch.signbit(model[0].weight[model[0].weight == 0]).any()


def test_score_callable_sees_name_and_module():
    model = mlp(4, 4, 2)
    seen = []

    def lowest_index_first(name: str, module: nn.Module) -> torch.Tensor:
        seen.append((name, module))
        return torch.arange(module.weight.numel(), dtype=torch.float32).view_as(module.weight) - 100

    prune(model, 0.5, score=lowest_index_first)
    assert seen == [("0", model[0])]
    assert (model[0].weight == 0).flatten().tolist() == [True] * 8 + [False] * 8


def test_zero_weights_go_first_whatever_the_score_says():
    linear = nn.Linear(4, 1)
    linear.weight.data = torch.tensor([[1.0, 2.0, 0.0, 3.0]])
    prune(linear, 0.5, score=lambda name, module: torch.tensor([[1.0, 2.0, 9.0, 3.0]]))
    assert linear.weight.tolist() == [[0.0, 2.0, 0.0, 3.0]]


def test_sparsity_per_layer():
    model = mlp(10, 10, 10, 10, 2)
    prune(model, {"1": 0.5, "re:[12]": 0.9, "3": 0.25})
    assert zeros(model) == {"0": 0, "1": 50, "2": 90, "3": 5}  # "3" is the head, but it is named


def test_pattern_respects_ignore():
    model = mlp(10, 10, 10, 2)
    prune(model, {"re:.*": 0.5}, ignore=["0"])
    assert zeros(model) == {"0": 0, "1": 50, "2": 10}


def test_tied_weights_are_not_pruned():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    before = model.transformer.wte.weight.clone()
    report = prune(model, 0.9)
    assert torch.equal(model.transformer.wte.weight, before)
    assert report.overall_pruned == pytest.approx(0.9, abs=0.01)


def test_wrapped_model_is_pruned_in_place():
    model = mlp(8, 8, 2)
    prune(nn.DataParallel(model), 0.5)
    assert zeros(model) == {"0": 32, "1": 0}


def test_global_scope_may_prune_layers_unevenly():
    model = mlp(8, 8, 8)
    model[0].weight.data.mul_(100)
    prune(model, 0.5, scope="global", ignore=[])
    assert zeros(model)["1"] > 60


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be a number from 0 up to but not including 1, not 1.0"),
        ({"sparsity": -0.1}, "sparsity must be a number"),
        ({"sparsity": math.nan}, "sparsity must be a number"),
        ({"sparsity": "half"}, "sparsity must be a number"),
        ({"sparsity": {"0": 2}}, "sparsity of '0' must be a number"),
        ({"sparsity": {"9": 0.5}}, "'9' matches no prunable layer"),
        ({"sparsity": {}}, "no layer to prune"),
        ({"sparsity": {"0": 0.5}, "scope": "erk"}, "goes with scope=\"uniform\", not 'erk'"),
        ({"scope": "local"}, "unknown scope 'local'; choose from uniform, erk, global"),
        ({"score": "taylor"}, "unknown score 'taylor'; choose from magnitude"),
        ({"score": lambda name, module: torch.zeros(3)}, r"score of layer '0' must be a tensor of shape \(8, 8\)"),
        ({"score": lambda name, module: None}, "must be a tensor of shape .* not NoneType"),
        ({"score": lambda name, module: module.weight * math.nan}, "'0.weight' has NaN"),
        ({"structure": "3:2"}, "structure '3:2'"),
        ({"ignore": ["re:.*"]}, "no layer to prune"),
    ],
)
def test_errors_change_nothing(arguments, message):
    model = mlp(8, 8, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune(model, **arguments)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_stem_and_head_alone_leave_nothing_to_prune():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"no layer to prune \(0: stem; 1: classifier head\); pass ignore=\[\]"):
        prune(model, 0.5)


def test_native_layers_are_refused():
    model = mlp(32, 32, 2)
    prune(model, 0.9)
    sparse_ft.convert(model, policy="always")
    with pytest.raises(ValueError, match=r"'0' is a native sparse layer.*call sparse_ft.to_dense\(model\) first"):
        prune(model, 0.95)
    sparse_ft.to_dense(model)
    prune(model, 0.95)
    assert zeros(model)["0"] == round(1024 * 0.95)


def test_compute_masks_is_what_prune_applies():
    model = mlp(8, 8, 8, 2)
    masks = compute_masks(prunable_layers(model), 0.7, scope="erk")
    prune(model, 0.7, scope="erk")
    assert {name: mask.tolist() for name, mask in mask_state(model).items()} == {
        f"{name}.weight": mask.tolist() for name, mask in masks.items()
    }
