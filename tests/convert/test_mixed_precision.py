"""Under autocast to bfloat16: activations are bfloat16, and the network trains like the masked dense one."""

import copy

import pytest
import torch
from test_compile import Net
from torch import nn
from zoo import bert, classified, image, loss_and_logits, small_resnet

import sparse_ft
from sparse_ft.nn import SparseModule
from sparse_ft.ops import is_batch_last

STEPS = 20
NETWORKS = {"resnet": (small_resnet, lambda: image(64, 16)), "bert": (bert, classified)}


def autocast(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def train(model: nn.Module, batch, masks: dict[str, torch.Tensor], *, bf16: bool) -> tuple[list[float], torch.Tensor]:
    """Losses of some steps, and what the parameters and statistics are after them."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        with autocast(bf16):
            loss, _ = loss_and_logits(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, mask in masks.items():
                model.get_parameter(name).mul_(mask)
        losses.append(loss.item())
    return losses, flat(model)


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat(
        [tensor.double().flatten() for name, tensor in model.state_dict().items() if "num_batches" not in name]
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_training_follows_the_masked_dense_network(network):
    new, new_batch = NETWORKS[network]
    model, batch = new(), new_batch()
    sparse_ft.prune(model, 0.8)
    masks = {name: p != 0 for name, p in model.named_parameters() if p.dim() > 1 and not p.all()}
    start = flat(model)
    _, exact = train(copy.deepcopy(model), batch, masks, bf16=False)
    want, dense = train(copy.deepcopy(model), batch, masks, bf16=True)
    sparse_ft.convert(model, policy="always")
    got, sparse = train(model, batch, {}, bf16=True)

    assert all(p.dtype == torch.float32 for p in model.parameters())
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.02)
    way = float((exact - start).norm())
    assert float((sparse - dense).norm()) < 0.1 * way
    # As near to training in float32 as the dense network in bfloat16.
    assert float((sparse - exact).norm()) < 1.5 * float((dense - exact).norm())


def test_what_is_kept_for_backward_is_bfloat16():
    model, batch = small_resnet().train(), image(64, 16)
    sparse_ft.prune(model, 0.8)
    sparse_ft.convert(model, policy="always")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t), autocast():
        loss_and_logits(model, batch)
    kept = [t for t in kept if t.dim() == 4 and t.is_floating_point() and t.shape[0] == len(batch)]
    images = [t for t in kept if t.shape == batch.shape]  # the stem's, as it is given
    assert len(kept) - len(images) > 20
    assert all(t.dtype == torch.bfloat16 for t in kept if t.data_ptr() != batch.data_ptr())


def test_activations_stay_in_their_layout():
    model, batch = small_resnet().train(), image(64, 16)
    sparse_ft.prune(model, 0.8)
    sparse_ft.convert(model, policy="always")
    seen = []
    for module in model.modules():
        if isinstance(module, SparseModule):
            module.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    with autocast():
        model(batch)
    assert len(seen) > 10
    for x, y in seen:
        assert x.dtype == y.dtype == torch.bfloat16
        assert y.dim() != 4 or (is_batch_last(x) and is_batch_last(y))


def test_convert_measures_in_the_precision_that_is_on(monkeypatch):
    model, batch = small_resnet(), image(32)
    sparse_ft.prune(model, 0.9)
    seen = set()
    layer = nn.Conv2d.forward

    def forward(self, x):
        y = layer(self, x)
        seen.add(y.dtype)
        return y

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    for bf16, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        seen.clear()
        with autocast(bf16):
            report = sparse_ft.convert(copy.deepcopy(model), batch)
        assert seen == {dtype} and any(layer.dense_ms for layer in report.layers)
    with torch.autocast("cpu", torch.float16):
        report = sparse_ft.convert(copy.deepcopy(model), batch)
    assert not report.converted and any("float16" in layer.reason for layer in report.layers)


def test_compile():
    net = Net()
    sparse_ft.prune(net, 0.7)
    sparse_ft.convert(net, policy="always")
    compiled_net = copy.deepcopy(net)
    torch._dynamo.reset()
    compiled, x = torch.compile(compiled_net, backend="aot_eager", fullgraph=True), image(10)
    with autocast():
        want, got = net(x), compiled(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.03)
    want.float().square().sum().backward()
    got.float().square().sum().backward()
    for (name, a), (_, b) in zip(compiled_net.named_parameters(), net.named_parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad, rtol=0.1, atol=0.05 * float(b.grad.abs().max()), msg=name)
