"""torch.compile and torch.export see the native operators as operators, not as breaks in the graph."""

import copy
import shutil

import pytest
import torch
from torch import nn
from zoo import image

import sparse_ft
from sparse_ft.nn import SparseModule


class Net(nn.Module):
    """After conversion: a dense stem, two sparse convolutions with a norm between, a sparse linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = self.norm(self.one(self.stem(x).relu())).relu()
        return self.head(self.two(x).relu().mean((2, 3)))


@pytest.fixture
def net():
    model = Net()
    with torch.no_grad():
        for layer in (model.one, model.two, model.head):
            layer.weight.masked_fill_(torch.rand(layer.weight.shape) < 0.7, 0.0)
    sparse_ft.convert(model, policy="always")
    assert sum(isinstance(module, SparseModule) for module in model.modules()) == 3
    return model


def test_compile(net):
    """One graph without a break; outputs, gradients and statistics are those of the eager model."""
    compiled_net = copy.deepcopy(net)
    torch._dynamo.reset()
    backend = "inductor" if shutil.which("g++") else "aot_eager"
    compiled = torch.compile(compiled_net, backend=backend, fullgraph=True)
    x = image(10)
    for _ in range(2):
        want, got = net(x), compiled(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        want.square().sum().backward()
        got.square().sum().backward()
    for (name, a), (_, b) in zip(compiled_net.named_parameters(), net.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=name)
    torch.testing.assert_close(compiled_net.norm.running_var, net.norm.running_var)


def test_compile_for_batches_of_any_size(net):
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", dynamic=True)
    for batch in (4, 7, 16):
        x = image(10, batch)
        torch.testing.assert_close(compiled(x), copy.deepcopy(net)(x), rtol=1e-4, atol=1e-5)


def test_a_compiled_model_converts_under_its_own_names():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with torch.no_grad():
        model[0].weight[1:] = 0.0
    assert sparse_ft.convert(torch.compile(model, backend="eager"), policy="always").converted == ["0"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_export(net, dynamic):
    net.eval()
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}} if dynamic else None
    exported = torch.export.export(net, (image(10),), dynamic_shapes=shapes)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("sparse_ft.conv2d.default") == 2 and targets.count("sparse_ft.linear.default") == 1
    assert "sparse_ft.batch_norm.default" in targets
    for batch in (4, 9) if dynamic else (4,):
        x = image(10, batch)
        torch.testing.assert_close(exported.module()(x), net(x), rtol=1e-4, atol=1e-5)
