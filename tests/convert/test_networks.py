"""Whole networks of timm and transformers: the converted one is the masked dense one, only faster."""

import copy

import pytest
import torch
from torch import nn
from zoo import NETWORKS, bert, classified, image, loss_and_logits, small_resnet

import sparse_ft
from sparse_ft.nn import SparseModule


def results(model: nn.Module, batch, masks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits, batch statistics and all gradients in the shape of the dense ones, those of pruned weights left out."""
    model.zero_grad()
    loss, logits = loss_and_logits(model, batch)
    loss.backward()
    found = {"logits": logits.detach().clone()}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    for name, parameter in model.named_parameters():
        module, grad = model.get_submodule(name.rpartition(".")[0]), parameter.grad
        if grad is None:
            continue
        if isinstance(module, SparseModule) and name.endswith(".weight"):
            grad = module.pattern.to_dense(grad)
            grad = grad.t() if module.stored_transposed else grad
        elif name in masks:
            grad = grad * masks[name]
        found[f"gradient of {name}"] = grad.clone()
    return found


def assert_equal(state: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert list(state) == list(want)
    for key, tensor in want.items():
        assert torch.equal(state[key], tensor), key


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


@pytest.mark.parametrize("network", NETWORKS)
def test_the_converted_network_is_the_masked_dense_one(network):
    new, new_batch = NETWORKS[network]
    model, batch = new().train(), new_batch()
    sparse_ft.prune(model, 0.9)
    dense = copy.deepcopy(model)
    masks = {name: p != 0 for name, p in dense.named_parameters()}

    report = sparse_ft.convert(model, policy="always")
    sparse_layers = {name for name, module in model.named_modules() if isinstance(module, SparseModule)}
    pruned = {name for name, mask in masks.items() if mask.dim() > 1 and mask.float().mean() < 0.2}
    assert {f"{name}.weight" for name in report.converted} == {f"{name}.weight" for name in sparse_layers} == pruned
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in dense.named_parameters()]

    held = {name: masks[name] for name in pruned}
    # In evaluation every tensor by itself; some gradients are nothing but rounding (of biases before a softmax).
    got, want = (results(network.eval(), batch, held) for network in (model, dense))
    rounding = 1e-6 * flat(want).norm()
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert got[name].shape == tensor.shape, name
        assert (got[name] - tensor).norm() <= 1e-2 * tensor.norm() + rounding, name
    # In training, batch norms of a small batch blow rounding up until signs flip in an activation: all in all.
    got, want = (flat(results(network.train(), batch, held)) for network in (model, dense))
    assert (got - want).norm() <= 2e-2 * want.norm()

    # State dicts in both directions: the dense network takes the sparse one's, and the other way round.
    state, want_state = model.state_dict(), dense.state_dict()
    other = new()
    assert not any(other.load_state_dict(state))
    assert_equal(other.state_dict(), state)
    assert not any(model.load_state_dict(want_state))
    assert_equal(model.state_dict(), want_state)

    assert sparse_ft.to_dense(model) is model
    assert [(name, type(m)) for name, m in model.named_modules()] == [
        (name, type(m)) for name, m in dense.named_modules()
    ]
    assert str(model) == str(dense)
    assert_equal(model.state_dict(), want_state)
    model.eval(), dense.eval()
    with torch.no_grad():
        assert torch.equal(loss_and_logits(model, batch)[1], loss_and_logits(dense, batch)[1])


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_trains_step_by_step_as_the_masked_dense_network(name):
    """With momentum and weight decay, in neither of which a pruned weight may take part."""
    model = (small_resnet if name == "resnet" else bert)()
    sparse_ft.prune(model, 0.9)
    dense = copy.deepcopy(model)
    frozen = sparse_ft.freeze_masks(dense)
    sparse_ft.convert(model, policy="always")
    losses = []
    for network in (model, dense):
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
        torch.manual_seed(1)
        curve = []
        for _ in range(5):
            loss, _ = loss_and_logits(network, image(32, 16) if name == "resnet" else classified())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            frozen.apply()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] != losses[0][-1]
    state = model.state_dict()
    for key, tensor in dense.state_dict().items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-2, atol=1e-3)
        if key in frozen.masks:
            assert not state[key][~frozen.masks[key]].any(), key


@pytest.mark.parametrize("network", ["resnet18", "efficientnet_b0", "bert", "gpt2"])
def test_converted_networks_are_copied_and_pickled(network, tmp_path):
    new, new_batch = NETWORKS[network]
    model, batch = new().eval(), new_batch()
    sparse_ft.prune(model, 0.9)
    sparse_ft.convert(model, policy="always")
    torch.save(model, tmp_path / "model.pt")
    with torch.no_grad():
        want = loss_and_logits(model, batch)[1]
        for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert torch.equal(loss_and_logits(other, batch)[1], want)
