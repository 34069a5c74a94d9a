"""A convolution that takes a norm's activation unfinished trains as the dense model does, whatever else reads it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse_ft
from sparse_ft.nn import SparseConv2d, conv, deferred


class Chain(nn.Module):
    """conv, norm, activation, conv; `between` is what the model's code does with the activation."""

    def __init__(self, activation, between=lambda x: x, stride=1):
        super().__init__()
        self.first, self.norm = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.last = nn.Conv2d(8, 10, 3, stride, padding=1), nn.BatchNorm2d(10)
        self.other = nn.Conv2d(8, 10, 1, stride)
        self.activation, self.between = activation, between
        for layer in (self.first, self.second, self.other):
            with torch.no_grad():
                layer.weight.mul_(torch.rand_like(layer.weight) < 0.4)

    def activated(self, x):
        return self.between(self.activation(self.norm(self.first(x))))

    def forward(self, x):
        return self.last(self.second(self.activated(x)))


class Branches(Chain):
    def forward(self, x):
        y = self.activated(x)
        return self.last(self.second(y) + self.other(y))


class Checkpointed(Chain):
    def forward(self, x):
        x = x.clone().requires_grad_()  # without a gradient the reentrant form would give none to what is within
        return self.last(checkpoint(lambda x: self.second(self.activated(x)), x, use_reentrant=self.reentrant))


class HalfCheckpointed(Chain):
    def forward(self, x):
        return self.last(checkpoint(self.second, self.activated(x), use_reentrant=False))


def observed(x):
    x.mean()
    return x


def hooked(x):
    if x.requires_grad:
        x.register_hook(lambda grad: grad * 0.5)
    return x


@pytest.fixture
def taken(monkeypatch):
    """Counts convolutions that took an unfinished activation."""
    calls, compute = [], conv.conv2d_of_unfinished

    def counted(*args):
        calls.append(args)
        return compute(*args)

    monkeypatch.setattr(conv, "conv2d_of_unfinished", counted)
    return calls


def train(model, steps=4, size=(17, 6, 7, 9)):
    """Losses, and the model's state after."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        x = torch.randn(size, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)
        loss = (model(x) * torch.linspace(-1, 1, 10, dtype=x.dtype).view(1, -1, 1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def compare(dense, steps=4):
    """Train `dense` in float64 with its mask, and a converted copy; then evaluate both."""
    sparse = copy.deepcopy(dense)
    sparse_ft.convert(sparse, policy="always", min_sparsity=0.0)
    assert isinstance(sparse.second, SparseConv2d)
    wide = copy.deepcopy(dense).double()
    frozen = sparse_ft.nn.freeze_masks(wide)
    want = train(wide, steps)
    assert train(sparse, steps) == pytest.approx(want, rel=1e-4)
    frozen.remove()
    x = torch.randn(16, 6, 7, 9)
    for module in (sparse, wide):
        module.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(sparse(x).double(), wide(x.double()), rtol=1e-3, atol=1e-4)


ACTIVATIONS = {
    "relu": F.relu,
    "relu module": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu6 in place": nn.ReLU6(inplace=True),
    "hardswish": nn.Hardswish(inplace=True),
}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_trains_as_the_dense_model(taken, name, stride):
    compare(Chain(ACTIVATIONS[name], stride=stride))
    assert len(taken) == 4  # in evaluation the first convolution computes the norm


def test_few_samples_are_computed_at_once(taken):
    """A convolution of a few samples reads value by value; the next batch may be a large one."""
    model = Chain(F.relu)
    sparse_ft.convert(model, policy="always", min_sparsity=0.0)
    train(model, steps=2, size=(3, 6, 7, 9))
    assert not taken
    train(model, steps=2)
    assert len(taken) == 2


def test_a_small_activation_is_computed_at_once(taken, monkeypatch):
    model = Chain(F.relu)
    sparse_ft.convert(model, policy="always", min_sparsity=0.0)
    monkeypatch.setattr(deferred, "FEWEST_VALUES", 17 * 8 * 7 * 9 + 1)
    train(model, steps=2)
    assert not taken
    monkeypatch.setattr(deferred, "FEWEST_VALUES", 17 * 8 * 7 * 9)
    train(model, steps=2)
    assert len(taken) == 2


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_a_costly_activation_is_computed_once(taken, name):
    compare(Chain(getattr(F, name)))
    assert not taken


@pytest.mark.parametrize(
    "between", [observed, lambda x: x * 2, lambda x: F.max_pool2d(x, 3, 1, 1), lambda x: F.relu(x - 0.5), F.relu]
)
def test_others_want_it_too(taken, between):
    """Where anything else reads the activation it is finished, after one attempt at most."""
    compare(Chain(F.relu, between), steps=5)
    assert len(taken) <= 1


def test_hooks_and_views(taken):
    compare(Chain(F.relu, hooked))
    compare(Chain(F.relu, lambda x: x.flatten(2).view(x.shape)))


def check_to_the_last_bit(model, size):
    """What waits is learned as training goes on; a resumed run, which learns anew, must not differ."""
    impatient, before = copy.deepcopy(model), deferred.Patience.lasts
    losses = train(model, size=size)
    deferred.Patience.lasts = lambda self, x: False
    try:
        assert train(impatient, size=size) == losses
    finally:
        deferred.Patience.lasts = before
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, impatient.state_dict()[name]), name


@pytest.mark.parametrize("kind", [Chain, Branches])
@pytest.mark.parametrize("size", [(16, 6, 7, 9), (32, 6, 12, 12)])
def test_to_the_last_bit(kind, size):
    model = kind(F.relu)
    sparse_ft.convert(model, policy="always", min_sparsity=0.0)
    check_to_the_last_bit(model, size)


def test_two_convolutions_read_it(taken):
    compare(Branches(F.relu), steps=5)
    assert len(taken) <= 1


@pytest.mark.parametrize("reentrant", [True, False])
def test_inside_a_checkpoint(reentrant):
    model = Checkpointed(F.relu)
    model.reentrant = reentrant
    compare(model)


def test_into_a_checkpoint():
    compare(HalfCheckpointed(nn.ReLU(inplace=True)))


def test_what_it_was_computed_from_may_not_change(taken):
    model = Chain(F.relu)
    sparse_ft.convert(model, policy="always", min_sparsity=0.0)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(16, 6, 7, 9))
        y = F.relu(model.norm(model.first(torch.randn(16, 6, 7, 9))))
        model.norm.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified in place before the result was used"):
            model.second(y)


def test_less_is_kept_for_backward(taken):
    def kept(model):
        saved = {}
        stack = [model.second(model.activated(torch.randn(16, 6, 16, 16))).grad_fn]
        while stack:
            node = stack.pop()
            if node is None:
                continue
            for tensor in getattr(node, "saved_tensors", ()):
                if tensor is not None and tensor.dim() == 4 and tensor.shape[1] == 8:
                    saved[tensor.data_ptr()] = tensor.numel()
            stack.extend(parent for parent, _ in node.next_functions)
        return sum(saved.values())

    model = Chain(F.relu)
    sparse_ft.convert(model, policy="always", min_sparsity=0.0)
    unfinished = kept(model)
    assert len(taken) == 1
    deferred.Patience.lasts, before = lambda self, x: False, deferred.Patience.lasts
    try:
        assert unfinished == kept(model) // 2
    finally:
        deferred.Patience.lasts = before
