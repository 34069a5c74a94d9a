"""A norm's output that waits for what follows: whatever follows, it is what torch computes."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparse_ft.nn import follow_layout
from sparse_ft.nn.deferred import Deferred
from sparse_ft.ops import BATCH_LAST, is_batch_last

SHAPE = (5, 6, 4, 7)


def batch_last(x: torch.Tensor) -> torch.Tensor:
    return torch.ops.sparse_ft.to_layout(x.detach(), BATCH_LAST)


def pair() -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    stock = nn.BatchNorm2d(6)
    for parameter in stock.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    norm = copy.deepcopy(stock)
    assert follow_layout(norm)
    return stock, norm


class Double(torch.autograd.Function):
    """Sees its input below `__torch_function__`, and keeps it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 + 0 * x


class Keep(torch.autograd.Function):
    """Does nothing with its input but keep and return it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * x


def in_place(y, s):
    y += s
    return y


def through_an_alias(y, s):
    z = y
    y += s
    F.relu(y, inplace=True)  # its result is not used
    return z


def in_place_after_all(y, s):
    z = y.mul(2)
    y.mul_(s)
    y += z
    return y.relu_()


def view_changed_in_place(y, s):
    y[:, 0].add_(s[:, 1])
    return y


def observed(y, s):
    torch.mean(y)
    with torch.no_grad():
        y.abs().sum()
    return F.relu(y + s)


def hooked(y, s):
    y.register_hook(lambda grad: grad * 3)
    return F.relu(y)


# What a model may do with a norm's output y and another tensor s; and whether one pass does it all.
FUSED = {
    "relu": lambda y, s: F.relu(y),
    "relu in place": lambda y, s: F.relu(y, inplace=True),
    "relu method": lambda y, s: y.relu(),
    "relu_ method": lambda y, s: y.relu_(),
    "torch.relu": lambda y, s: torch.relu(y),
    "relu6": lambda y, s: F.relu6(y),
    "hardtanh": lambda y, s: F.hardtanh(y, 0.0, 6.0),
    "silu": lambda y, s: F.silu(y, inplace=True),
    "hardswish": lambda y, s: F.hardswish(y),
    "gelu": lambda y, s: F.gelu(y),
    "gelu tanh": lambda y, s: F.gelu(y, approximate="tanh"),
    "modules": lambda y, s: nn.Hardswish(inplace=True)(nn.Identity()(y)),
    "residual": lambda y, s: F.relu(y + s),
    "residual on the left": lambda y, s: F.relu(s + y),
    "residual in place": lambda y, s: F.relu(in_place(y, s), inplace=True),
    "torch.add": lambda y, s: torch.add(y, s).relu(),
    "silu of a sum": lambda y, s: F.silu(y + s),
    "shape in between": lambda y, s: F.relu(y) if y.shape == s.shape and y.dim() == 4 and y.stride() else y,
    "alias": through_an_alias,
}
OTHERS = {
    "nothing": lambda y, s: y,
    "sum alone": lambda y, s: y + s,
    "other activation": lambda y, s: F.mish(y),
    "hardtanh of other bounds": lambda y, s: F.hardtanh(y),
    "leaky": lambda y, s: F.leaky_relu(y, 0.1, inplace=True),
    "scaled sum": lambda y, s: torch.add(y, s, alpha=2).relu(),
    "scaled sum in place": lambda y, s: y.add_(s, alpha=2).relu(),
    "a number": lambda y, s: F.relu(y + 1),
    "broadcast": lambda y, s: F.relu(y + s[:1]),
    "sum into a smaller one": lambda y, s: F.relu(s[:1].clone() + y),
    "two sums": lambda y, s: F.relu(y + s + s),
    "itself": lambda y, s: F.relu(y + y),
    "itself in place": lambda y, s: F.relu(in_place(y, y)),
    "into another": lambda y, s: F.relu(in_place(s * 1, y)),
    "used twice": lambda y, s: F.relu(y) + F.silu(y) * s,
    "used before and after": lambda y, s: (y * 2, in_place(y, s), F.relu(y))[0] + F.relu(y),
    "in place after all": in_place_after_all,
    "view": lambda y, s: F.relu(y.flatten(2)),
    "view in place": view_changed_in_place,
    "slices": lambda y, s: torch.cat([y[:, :2] + s[:, :2], y[:, 2:]], 1),
    "gate": lambda y, s: y * torch.sigmoid(y.mean((2, 3), keepdim=True)),
    "observed": observed,
    "hook": hooked,
    "detached": lambda y, s: F.relu(y) + y.detach(),
    "custom function": lambda y, s: Double.apply(y),
    "custom function that keeps": lambda y, s: F.relu(Keep.apply(y)),
    "custom function of a sum": lambda y, s: Double.apply(in_place(y, s)),
    "checkpoint": lambda y, s: checkpoint(F.relu, y, use_reentrant=False),
    "reentrant checkpoint": lambda y, s: checkpoint(F.relu, y, use_reentrant=True),
    "double": lambda y, s: F.relu(y.double()).float(),
    "list": lambda y, s: torch.stack([row.relu() for row in y]),
    "where": lambda y, s: torch.where(y > 0, y, s),
    "out": lambda y, s: torch.add(y.detach(), s.detach(), out=torch.empty(SHAPE)) + y,
}
ALL = FUSED | OTHERS


def result(norm, expression, x, s, grad):
    x, s = x.requires_grad_(True), s.requires_grad_(True)
    norm.zero_grad()
    y = expression(norm(x), s)
    y.backward(grad.view(y.shape))
    return [y.detach(), x.grad, s.grad, norm.weight.grad, norm.bias.grad, *norm.buffers()]


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_whatever_follows(name, training):
    stock, norm = pair()
    for step in range(2):
        stock.train(training), norm.train(training)
        x, s, grad = torch.randn(SHAPE) * 2, torch.randn(SHAPE), torch.randn(SHAPE)
        want = result(stock, ALL[name], x.clone(), s.clone(), grad)
        got = result(norm, ALL[name], batch_last(x), batch_last(s) if step else s.clone(), grad)
        assert_same(got, want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in ALL if name != "hook"])
def test_whatever_follows_without_gradients(name, training, mode):
    stock, norm = pair()
    stock.train(training), norm.train(training)
    x, s = torch.randn(SHAPE) * 2, torch.randn(SHAPE)
    with mode():
        want, y = ALL[name](stock(x), s.clone()), ALL[name](norm(batch_last(x)), batch_last(s))
    assert not y.requires_grad
    assert_same([y * 1, *norm.buffers()], [want, *stock.buffers()])


@pytest.mark.parametrize("name", FUSED)
def test_one_pass(name):
    """No plain result in between; the activation is part of the norm's own node."""
    norm = pair()[1]
    for _ in range(2):  # at first an activated norm waits for a convolution
        y = FUSED[name](norm(batch_last(torch.randn(SHAPE)).requires_grad_(True)), batch_last(torch.randn(SHAPE)))
        y * 1
    y = y._stands_for if isinstance(y, Deferred) else y  # of an alias
    assert type(y) is torch.Tensor and is_batch_last(y) and "BatchNorm" in y.grad_fn.name()


@pytest.mark.parametrize("wrapped", [checkpoint, None])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", FUSED)
def test_checkpoint_around(name, use_reentrant, wrapped):
    """The norm alone in a checkpoint gives its deferred output away; or all of it is in."""
    stock, norm = pair()
    x, s, grad = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)

    def around(module):
        if wrapped is None:
            return lambda x, s: checkpoint(lambda x, s: FUSED[name](module(x), s), x, s, use_reentrant=use_reentrant)
        return lambda x, s: FUSED[name](checkpoint(module, x, use_reentrant=use_reentrant), s)

    results = []
    for module, one, other in ((stock, x.clone(), s.clone()), (norm, batch_last(x), batch_last(s))):
        one, other = one.requires_grad_(True), other.requires_grad_(True)
        y = around(module)(one, other)
        y.backward(grad)
        results.append([y.detach(), one.grad, other.grad, module.weight.grad])
        # torch's norm alone in a checkpoint runs twice and counts its batch twice; the deferred one has no need to.
        if wrapped is None or use_reentrant:
            results[-1].extend(module.buffers())
    assert_same(results[1], results[0])


def test_modes_change_in_between():
    stock, norm = pair()
    x = torch.randn(SHAPE)
    for made, used in ((torch.no_grad, torch.enable_grad), (torch.enable_grad, torch.no_grad)):
        results = []
        for module, one in ((stock, x.clone()), (norm, batch_last(x))):
            one.requires_grad_(True)
            with made():
                y = module(one)
            with used():
                z = F.relu(y)
                w = F.relu(y + one)
            results.append([z, w])
        assert [t.requires_grad for t in results[1]] == [t.requires_grad for t in results[0]]
        assert_same(*results)


def test_made_with_gradients_and_looked_at_in_inference_mode():
    stock, norm = pair()
    x, grad = torch.randn(SHAPE), torch.randn(SHAPE)

    def looked_at(y, s):
        with torch.inference_mode():
            y.sum(), F.relu(y), y + 1
        return F.relu(y)

    want = result(stock, looked_at, x.clone(), x.clone(), grad)
    assert_same(result(norm, looked_at, batch_last(x), x.clone(), grad), want)


@pytest.mark.parametrize("kind", ["forward", "full backward", "pre backward"])
def test_hooks_of_modules(kind):
    """On the norm, and on a module that gives the deferred output on."""
    results = []
    for module in pair():
        around, seen = nn.Sequential(nn.Identity(), module, nn.Identity()), []
        for part in (module, around):
            if kind == "forward":
                part.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y.detach() * 1))
            elif kind == "full backward":
                part.register_full_backward_hook(lambda m, before, after, seen=seen: seen.extend([*before, *after]))
            else:
                part.register_full_backward_pre_hook(lambda m, grad: (grad[0] * 2,))
        torch.manual_seed(0)
        x, s, grad = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
        x = x if module is around[1] and type(module) is nn.BatchNorm2d else batch_last(x)
        got = result(module, lambda y, s: F.relu(y), x, s, grad)
        x.grad = None
        y = F.relu(around(x) + s)
        y.backward(grad)
        results.append([*got[:2], y, x.grad, *seen])
    assert len(results[0]) == len(results[1])
    assert_same(results[1], results[0])


def test_operands_changed_in_between():
    """Never a result from other numbers than those of the call."""
    norm = pair()[1].eval()
    for change in (lambda x, s: x.mul_(2), lambda x, s: s.mul_(2), lambda x, s: norm.weight.mul_(2)):
        x, s = batch_last(torch.randn(SHAPE)), batch_last(torch.randn(SHAPE))
        with torch.no_grad():
            y = norm(x) + s
            change(x, s)
            with pytest.raises(RuntimeError, match="modified in place before the result was used"):
                F.relu(y)


def test_statistics_of_the_module_may_change_in_between():
    norm, x = pair()[1].eval(), batch_last(torch.randn(SHAPE))
    want = norm(x).relu()
    y = norm(x)
    norm.running_mean.add_(1)
    norm.running_var.mul_(2)
    assert torch.equal(y.relu(), want)


CHANGES = {
    "relu": lambda y, s: F.relu(y, inplace=True),
    "sum": lambda y, s: y.add_(s),
    "sum and relu": lambda y, s: y.add_(s).relu_(),
    "product": lambda y, s: y.mul_(s),
    "leaky": lambda y, s: F.leaky_relu(y, 0.1, inplace=True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_tensor_from_before_an_operation_in_place(name):
    """All who hold it see what it has become, also what goes around torch's functions."""
    stock, norm = pair()

    def changed(y, s):
        CHANGES[name](y, s)
        return Double.apply(Keep.apply(y)) * y.mean()

    for _ in range(2):
        x, s, grad = torch.randn(SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
        want = result(stock, changed, x.clone(), s.clone(), grad)
        assert_same(result(norm, changed, batch_last(x), batch_last(s), grad), want)
        with torch.no_grad():
            assert_same([changed(norm(batch_last(x)), s)], [changed(stock(x), s)])


def test_it_is_a_tensor():
    stock, norm = pair()
    x = torch.randn(SHAPE)
    want, y = stock(x), norm(batch_last(x))
    assert isinstance(y, torch.Tensor) and y.shape == SHAPE and y.dtype == torch.float32 and y.requires_grad
    assert y.device == x.device and not y.is_leaf and is_batch_last(y) and len(y) == 5 and y.numel() == x.numel()
    assert y._stands_for is None  # none of these looked at its values
    assert "grad_fn" in repr(y) and y.detach().numpy() == pytest.approx(want.detach().numpy(), abs=1e-5)
    assert y[0, 0, 0, 0].item() == pytest.approx(want[0, 0, 0, 0].item(), abs=1e-5)
    with torch.no_grad():
        for copied in (copy.deepcopy, copy.copy, lambda t: pickle.loads(pickle.dumps(t)), saved):
            z = copied(norm(batch_last(x)))
            torch.testing.assert_close(z * 1, want, rtol=1e-4, atol=1e-5)


def saved(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


def test_leaf_made_of_it():
    norm = pair()[1]
    with torch.no_grad():
        y = norm(batch_last(torch.randn(SHAPE)))
    y.requires_grad_(True)
    F.relu(y).sum().backward()
    assert torch.equal(y.grad, (y > 0).float())


def test_retained_gradient():
    norm, x = pair()[1], batch_last(torch.randn(SHAPE)).requires_grad_(True)
    y = norm(x)
    y.retain_grad()
    F.relu(y).sum().backward()
    assert torch.equal(y.grad, (y > 0).float())


def test_gradient_of_the_output_itself():
    stock, norm = pair()
    x, grad = torch.randn(SHAPE), torch.randn(SHAPE)
    one, two = x.clone().requires_grad_(True), batch_last(x).requires_grad_(True)
    y, z = stock(one), norm(two)
    want = torch.autograd.grad([y], [one, stock.weight], [grad])
    assert_same(torch.autograd.grad([z * 1], [two, norm.weight], [grad]), want)
    (a,) = torch.autograd.grad(F.relu(norm(two)).sum(), norm.bias)
    (b,) = torch.autograd.grad(F.relu(stock(one)).sum(), stock.bias)
    torch.testing.assert_close(a, b)


def test_traced():
    stock, norm = pair()
    stock.eval(), norm.eval()
    x = torch.randn(SHAPE)
    exported = torch.export.export(nn.Sequential(norm, nn.ReLU()), (batch_last(x),))
    torch.testing.assert_close(exported.module()(batch_last(x)), stock(x).relu(), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.relu(norm(x)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch_last(x)), stock(x).relu(), rtol=1e-4, atol=1e-5)
