"""Norms fused with what follows them, over timm's families of networks: still the masked dense network."""

import copy

import pytest
import timm
import torch
from torch import nn

import sparse_ft
from sparse_ft.nn import SparseConv2d, SparseModule, conv, deferred

# Narrow and shallow, so that rounding is not blown up by many norms of few values.
NETWORKS = {
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
    "resnet50d": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32), "stem_width": 8},
    "resnext50_32x4d": {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "cardinality": 4, "base_width": 8},
    "seresnet18": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
    "mobilenetv1_100": {},
    "mobilenetv2_050": {},
    "mobilenetv3_small_050": {},
    "efficientnet_b0": {},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "regnetx_002": {},
    "regnety_002": {},
    "vgg11_bn": {"mlp_ratio": 0.02},
}
# How many norms take an activation (and how many of those a residual) in one pass; timm's BatchNormAct2d needs nobody.
ACTIVATED = {"resnet18": (9, 4), "resnet50": (13, 4), "resnext50_32x4d": (13, 4), "vgg11_bn": (8, 0)}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **NETWORKS[name])
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1.0  # keeps channels that hardly vary from blowing rounding up
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.0
    sparse_ft.prune(model, 0.8)
    return model


def train(model: nn.Module, masks: dict[str, torch.Tensor], batches: list[torch.Tensor]) -> list[dict]:
    """Of each step: outputs, gradients in dense form, running statistics."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
    found = []
    for x in batches:
        optimizer.zero_grad()
        y = model(x)
        nn.functional.cross_entropy(y, torch.arange(len(y)) % 10).backward()
        gradients = {}
        for name, parameter in model.named_parameters():
            module, grad = model.get_submodule(name.rpartition(".")[0]), parameter.grad
            if isinstance(module, SparseModule) and name.endswith("weight"):
                grad = module.pattern.to_dense(grad)
            elif name in masks:
                grad = parameter.grad = grad * masks[name]
            gradients[name] = grad.flatten().clone()
        statistics = [b.flatten().clone() for n, b in model.named_buffers() if "running" in n]
        found.append({"outputs": y.detach(), "gradients": gradients, "statistics": torch.cat(statistics)})
        optimizer.step()
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_the_fused_network_is_the_masked_dense_one(name, monkeypatch):
    model = network(name)
    dense = copy.deepcopy(model)
    masks = {n: p != 0 for n, p in dense.named_parameters() if p.dim() > 1}
    sparse_ft.convert(model, policy="always")
    activated = []
    compute = deferred.PendingNorm.compute

    def counted(self):
        if self.activation:
            activated.append(self.residual is not None)
        return compute(self)

    def counted_taking(x):
        pending = deferred.take_unfinished(x)
        if pending is not None:  # by the convolution after it
            activated.append(False)
        return pending

    monkeypatch.setattr(deferred.PendingNorm, "compute", counted)
    monkeypatch.setattr(conv, "take_unfinished", counted_taking)
    batches = [torch.randn(16, 3, 64, 64) for _ in range(3)]
    # In evaluation nothing blows rounding up: every tensor by itself.
    for got, want in zip(*(train(m.eval(), masks, batches[:1]) for m in (model, dense)), strict=True):
        torch.testing.assert_close(got["outputs"], want["outputs"], rtol=1e-4, atol=1e-5)
        rounding = 1e-5 * torch.cat(list(want["gradients"].values())).norm()
        for parameter, gradient in want["gradients"].items():
            assert (got["gradients"][parameter] - gradient).norm() <= 1e-2 * gradient.norm() + rounding, parameter
    if name in ACTIVATED:
        assert (len(activated), sum(activated)) == ACTIVATED[name]
    for got, want in zip(*(train(m.train(), masks, batches) for m in (model, dense)), strict=True):
        assert (got["outputs"] - want["outputs"]).norm() <= 1e-2 * want["outputs"].norm()
        assert (got["statistics"] - want["statistics"]).norm() <= 1e-4 * want["statistics"].norm()
        gradients = [torch.cat(list(result["gradients"].values())) for result in (got, want)]
        assert (gradients[0] - gradients[1]).norm() <= 5e-2 * gradients[1].norm()


@pytest.mark.parametrize("stems", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_norms_computed_by_their_convolutions(name, stems):
    """In evaluation the same numbers, for few samples and many, in either mode without gradients."""
    model = network(name).eval().requires_grad_(False)
    dense = copy.deepcopy(model)
    chosen = [
        n for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d) and (m.weight == 0).any() or (stems and isinstance(m, nn.Conv2d) and m.groups > 1)
        or (stems and isinstance(m, nn.Conv2d) and m.in_channels == 3)
    ]  # fmt: skip
    sparse_ft.convert(model, layers=chosen, min_sparsity=0.0)
    at_once = copy.deepcopy(model)
    for module in at_once.modules():
        if isinstance(module, SparseConv2d):
            module._patience.lose()
    for batch in (1, 5, 16):
        x = torch.randn(batch, 3, 64, 64)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got, again, want = model(x), at_once(x), dense(x)
            # Rounding alone: a Hardswish that nobody joins is torch's own.
            size = float(want.abs().max())
            torch.testing.assert_close(got, again, rtol=1e-5, atol=1e-6 * size)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * size)
