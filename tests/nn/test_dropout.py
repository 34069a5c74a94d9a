"""`nn.Dropout` beside sparse layers: native in training, stock everywhere else."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse_ft
from sparse_ft.nn import LayoutNorm, NativeDropout, follow_layout
from sparse_ft.ops import BATCH_LAST

SHAPE = (96, 96)


def native(p: float = 0.5, **options) -> nn.Dropout:
    module = nn.Dropout(p, **options)
    assert follow_layout(module, convolutions=False) and isinstance(module, NativeDropout)
    return module


def mlp() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(32, 96), nn.GELU(), nn.Dropout(0.5), nn.Linear(96, 4), nn.Dropout(0.1))
    sparse_ft.prune(model, 0.9)
    return model


def runs_native(module: nn.Module, x: torch.Tensor) -> bool:
    """Stock dropout draws another number of random numbers."""
    torch.manual_seed(0)
    module(x)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    torch.empty((), dtype=torch.int64).random_()
    return torch.equal(state, torch.get_rng_state())


def test_convert_adapts_and_to_dense_restores():
    model = mlp()
    keys, text = list(model.state_dict()), str(model)
    sparse_ft.convert(model, policy="always")
    assert [isinstance(module, NativeDropout) for module in model] == [False, False, True, False, True]
    assert list(model.state_dict()) == keys
    assert runs_native(model[2], torch.ones(SHAPE))
    sparse_ft.to_dense(model)
    assert str(model) == text and type(model[2]) is nn.Dropout


def test_without_sparse_layers_nothing_is_adapted():
    model = mlp()
    sparse_ft.convert(model, policy="always", ignore=["re:.*"])
    assert type(model[2]) is nn.Dropout


def test_layouts_are_minded_beside_convolutions_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 4))
    sparse_ft.prune(model, 0.9, ignore=["0"])
    sparse_ft.convert(model, policy="always")
    assert type(model[1]) is nn.BatchNorm2d and isinstance(model[2], NativeDropout)
    sparse_ft.to_dense(model)
    sparse_ft.prune(model, 0.9, ignore=[])
    sparse_ft.convert(model, policy="always")
    assert isinstance(model[1], LayoutNorm) and isinstance(model[2], NativeDropout)
    model(torch.randn(16, 3, 8, 8)).sum().backward()


def test_manual_seed_and_random_states_repeat_it():
    module, x = native(), torch.randn(SHAPE)
    torch.manual_seed(3)
    first, state, second = module(x), torch.get_rng_state(), module(x)
    torch.manual_seed(3)
    assert torch.equal(module(x), first) and not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(module(x), second)


def test_the_distribution_is_that_of_torch():
    y = native(0.2)(torch.ones(1000, 1000))
    assert y.unique().tolist() == [0.0, 1.25]
    assert y.mean().item() == pytest.approx(1.0, abs=5 * 0.5 / 1000)


def test_gradient():
    module, x = native(), torch.randn(SHAPE, requires_grad=True)
    y = module(x)
    y.backward(torch.ones(SHAPE))
    torch.testing.assert_close(y, x * x.grad)
    assert x.grad.unique().tolist() == [0.0, 2.0]


def test_evaluation_is_the_identity():
    module, x = native().eval(), torch.randn(SHAPE)
    assert module(x) is x


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_draw_the_same_again(use_reentrant):
    model = mlp()
    sparse_ft.convert(model, policy="always")
    x = torch.randn(96, 32, requires_grad=True)
    results = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(1)
        model.zero_grad()
        y = run(x)
        results.append([y, *torch.autograd.grad(y.sum(), x)] if run is model else [y])
    y = results[1][0]
    x.grad = None
    y.sum().backward()
    assert torch.equal(results[0][0], y) and torch.equal(results[0][1], x.grad)


def test_copies_and_pickles():
    module, x = native(0.3), torch.randn(SHAPE)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert isinstance(other, NativeDropout) and other.p == 0.3
        torch.manual_seed(0)
        want = module(x)
        torch.manual_seed(0)
        assert torch.equal(other(x), want)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_extremes_are_left_to_torch(p):
    x = torch.randn(SHAPE)
    assert torch.equal(native(p)(x), nn.Dropout(p)(x))


def test_what_is_left_to_torch():
    x = torch.randn(SHAPE)
    assert runs_native(native(), x) and runs_native(native(), x.bfloat16())
    y = x.clone()
    assert native(inplace=True)(y) is y
    image = torch.randn(8, 16, 8, 8)
    assert runs_native(native(), image)
    for other in (
        x[:4, :4].contiguous(),
        x.double(),
        x.half(),
        x.t(),
        image.contiguous(memory_format=torch.channels_last),
        torch.ops.sparse_ft.to_layout(image, BATCH_LAST),
    ):
        assert not runs_native(native(), other)
        torch.manual_seed(0)
        got = native()(other)
        torch.manual_seed(0)
        assert torch.equal(got, nn.Dropout(0.5)(other)) and got.stride() == other.stride()


def test_autocast():
    model = mlp()
    sparse_ft.convert(model, policy="always")
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(96, 32))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_compiled_it_is_torchs():
    module = torch.compile(native(), backend="aot_eager", fullgraph=True)
    assert module(torch.ones(SHAPE)).unique().tolist() == [0.0, 2.0]


def test_transforms():
    x = torch.randn(4, *SHAPE)
    y = torch.func.vmap(native(), randomness="different")(x)
    assert y.shape == x.shape


def test_after_a_deferred_norm():
    norm, dropout, x = nn.BatchNorm2d(8), native(), torch.randn(16, 8, 8, 8)
    assert follow_layout(norm)
    y = dropout(norm(torch.ops.sparse_ft.to_layout(x, BATCH_LAST)))
    assert type(y) is torch.Tensor and y.shape == x.shape
