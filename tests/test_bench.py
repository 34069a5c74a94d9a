import copy
import json

import pytest
import torch
from torch import nn

import sparse_ft
from sparse_ft.steps import loss_of
from sparse_ft.tune import interleaved_medians


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(*, images: bool) -> nn.Module:
    first = nn.Conv2d(3, 8, 3) if images else nn.Linear(12, 8)
    model = nn.Sequential(first, nn.BatchNorm2d(8) if images else nn.LayerNorm(8), nn.Flatten(), nn.LazyLinear(4))
    model(torch.randn(2, 3, 6, 6) if images else torch.randn(2, 12))
    with torch.no_grad():
        first.weight.masked_fill_(torch.rand(first.weight.shape) < 0.8, 0.0)
    sparse_ft.convert(model, policy="always")
    return model


@pytest.mark.parametrize("images", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_compares_without_touching_the_model(images, optimizer):
    model = network(images=images).eval()
    batch = torch.randn(4, 3, 6, 6) if images else torch.randn(4, 12)
    model(batch).sum().backward()
    before, gradients = copy.deepcopy(model), [parameter.grad.clone() for parameter in model.parameters()]
    result = sparse_ft.compare_steps(model, batch, steps=2, optimizer=optimizer)
    assert set(result.variants) == {"sparse", "dense contiguous"} | ({"dense channels_last"} if images else set())
    assert result.sparse_ms == result.variants["sparse"] > 0
    assert result.dense_ms == min(ms for name, ms in result.variants.items() if name != "sparse")
    assert result.speedup == pytest.approx(result.dense_ms / result.sparse_ms)
    assert result.rounds == 2 and result.threads == 1 and set(result.page_faults) == set(result.variants)
    assert json.loads(json.dumps(result.to_dict()))["speedup"] == result.speedup and "times as fast" in str(result)
    assert str(model) == str(before) and not model.training
    for name, tensor in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    for parameter, grad in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_wrong_use():
    model, batch = network(images=False), torch.randn(4, 12)
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adamw, not 'adam'"):
        sparse_ft.compare_steps(model, batch, optimizer="adam")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        sparse_ft.compare_steps(model, batch, steps=0)


def test_loss_is_the_models_own_where_it_has_one():
    x = torch.tensor([3.0, -1.0])
    assert loss_of(x) == loss_of((x, None)) == 5.0
    assert loss_of({"loss": torch.tensor(2.0), "logits": x}) == 2.0


def test_variants_take_turns():
    calls = []
    medians = interleaved_medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4)
    assert set(medians) == {"a", "b"} and calls[-8:] == ["a", "b"] * 4
