import pytest
import torch
from pruned import sparse_of, zeroed
from torch import nn

from sparse_ft.nn import freeze_masks


def make() -> nn.Module:
    model = nn.Sequential(zeroed(nn.Conv2d(3, 6, 3)), nn.Flatten(), zeroed(nn.Linear(24, 8)), nn.Linear(8, 2))
    return model


def train(model: nn.Module, frozen, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, 4, 4)).square().sum().backward()
        optimizer.step()
        frozen.apply()


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
    ],
    ids=["sgd", "adamw", "rmsprop"],
)
def test_pruned_weights_and_their_state_stay_zero(optimizer):
    model = make()
    masks = {name: p != 0 for name, p in model.named_parameters() if name in ("0.weight", "2.weight")}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    frozen = freeze_masks(model)
    optimizer = optimizer(model.parameters())
    train(model, frozen, optimizer)
    assert set(frozen.masks) == set(masks)
    for name, mask in masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any() and not weight.grad[~mask].any()
        assert not torch.equal(weight, before[name])
        for state in optimizer.state[weight].values():
            if isinstance(state, torch.Tensor) and state.shape == mask.shape:
                assert not state[~mask].any()
    assert not torch.equal(model.get_parameter("3.weight"), before["3.weight"])


def test_gradient_is_masked_as_it_accumulates():
    """Clipping sees what the sparse layer would see, also with gradients of several batches."""
    model = make()
    freeze_masks(model)
    for _ in range(2):
        model(torch.randn(5, 3, 4, 4)).square().sum().backward()
    for name in ("0.weight", "2.weight"):
        weight = model.get_parameter(name)
        assert not weight.grad[weight == 0].any()


def test_an_overflowed_gradient_does_not_revive_a_pruned_weight():
    """Infinity times zero would be NaN."""
    model = nn.Sequential(zeroed(nn.Linear(4, 3)))
    frozen = freeze_masks(model)
    pruned = ~frozen.masks["0.weight"]
    (model(torch.full((1, 4), torch.inf)) * torch.inf).sum().backward()
    assert not model[0].weight.grad[pruned].any()
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    frozen.apply()
    assert not model[0].weight[pruned].any()


def test_which_weights_are_taken():
    """Zeros of embeddings, of tokens, and of new layers that are all zeros are no pruning."""
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(5, 4, padding_idx=0),
            "norm": nn.BatchNorm2d(3),
            "pruned": zeroed(nn.Linear(4, 4)),
            "new": nn.Linear(4, 4),
            "dense": nn.Linear(4, 4),
            "conv1d": zeroed(nn.Conv1d(3, 4, 3)),
            "sparse": sparse_of(zeroed(nn.Linear(4, 4))),
        }
    )
    model.token = nn.Parameter(torch.zeros(1, 1, 4))
    nn.init.zeros_(model["new"].weight)
    assert set(freeze_masks(model).masks) == {"pruned.weight", "conv1d.weight"}


def test_given_masks():
    model = make()
    mask = torch.rand(8, 24) < 0.5
    frozen = freeze_masks(model, {"2.weight": mask, "absent.weight": mask})
    frozen.apply()
    assert set(frozen.masks) == {"2.weight"} and not model[2].weight[~mask].any()
    with pytest.raises(ValueError, match=r"mask of 2\.weight has shape \(8, 23\)"):
        freeze_masks(model, {"2.weight": mask[:, 1:]})


def test_masks_of_sparse_layers_are_passed_over():
    model = nn.Sequential(sparse_of(zeroed(nn.Linear(4, 4))))
    assert not freeze_masks(model, {"0.weight": model[0].mask()}).masks
    root = sparse_of(zeroed(nn.Linear(4, 4)))
    assert not freeze_masks(root, {"weight": root.mask()}).masks


def test_frozen_parameters_are_held_by_apply():
    model = make()
    model[2].weight.requires_grad_(False)
    frozen = freeze_masks(model)
    with torch.no_grad():
        model[2].weight.fill_(1.0)
    frozen.apply()
    assert torch.equal(model[2].weight != 0, frozen.masks["2.weight"])


def test_remove():
    model = make()
    frozen = freeze_masks(model)
    frozen.remove()
    model(torch.randn(5, 3, 4, 4)).square().sum().backward()
    assert model[2].weight.grad[~frozen.masks["2.weight"]].any()
