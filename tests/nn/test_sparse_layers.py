import copy
import io
import logging
import pickle

import pytest
import torch
from pruned import FORMS, sparse_of, zeroed
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer

from sparse_ft.nn import SparseConv2d, SparseLinear

forms = pytest.mark.parametrize("form", FORMS)


def make(form: str) -> tuple[nn.Module, torch.Tensor]:
    new, new_input = FORMS[form]
    return zeroed(new()), new_input()


def step(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the input's gradient under a loss that weighs every output differently."""
    x = x.detach().requires_grad_(True)
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return y.detach(), x.grad


@forms
def test_from_dense_and_back_is_exact(form):
    dense, _ = make(form)
    sparse = sparse_of(dense)
    again = sparse.to_dense()
    assert type(again) is type(dense) and str(again) == str(dense)
    assert torch.equal(again.weight, dense.weight) and again.bias is dense.bias
    assert sparse.weight.shape == (torch.count_nonzero(dense.weight), 1)
    assert sparse.dense_shape == dense.weight.shape
    assert torch.equal(sparse.dense_weight(), dense.weight) and torch.equal(sparse.mask(), dense.weight != 0)
    assert sparse.nnz == torch.count_nonzero(dense.weight)
    assert sparse.sparsity == pytest.approx(1 - sparse.nnz / dense.weight.numel())


@forms
def test_computes_as_the_dense_layer(form):
    dense, x = make(form)
    sparse = sparse_of(copy.deepcopy(dense))
    (y, grad_x), (want_y, want_grad_x) = step(sparse, x), step(dense, x)
    torch.testing.assert_close(y, want_y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_x, want_grad_x, rtol=1e-4, atol=1e-5)
    grad = sparse.pattern.to_dense(sparse.weight.grad)
    grad = grad.t() if sparse.stored_transposed else grad
    torch.testing.assert_close(grad, dense.weight.grad * sparse.mask(), rtol=1e-4, atol=1e-4)
    if dense.bias is not None:
        torch.testing.assert_close(sparse.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-4)


@forms
def test_state_dict_is_the_dense_one(form):
    dense, _ = make(form)
    sparse = sparse_of(dense)
    state = sparse.state_dict()
    assert list(state) == list(dense.state_dict())
    for key, tensor in dense.state_dict().items():
        assert torch.equal(state[key], tensor)
    other = sparse_of(dense)
    with torch.no_grad():
        other.weight.zero_()
    given = dict(state)
    assert other.load_state_dict(given) == nn.modules.module._IncompatibleKeys([], [])
    assert torch.equal(other.weight, sparse.weight)
    assert given["weight"] is state["weight"]  # the caller's dict is as it was
    new = FORMS[form][0]()
    new.load_state_dict(state)
    assert torch.equal(new.weight, dense.weight)


@pytest.mark.parametrize("assign", [False, True])
def test_load_copies_or_assigns_as_torch_does(assign):
    sparse = sparse_of(zeroed(nn.Linear(8, 6)))
    before = sparse.weight
    state = {key: tensor.clone() * 2 for key, tensor in sparse.state_dict().items()}
    sparse.load_state_dict(state, assign=assign)
    assert (sparse.weight is before) != assign
    assert isinstance(sparse.weight, nn.Parameter) and sparse.weight.shape == before.shape
    assert torch.equal(sparse.dense_weight(), state["weight"])


@pytest.mark.parametrize("form", ["linear", "Conv1D", "conv"])
def test_what_is_written_into_the_state_dict_becomes_the_weight(form):
    dense, x = make(form)
    sparse, other = sparse_of(dense), sparse_of(dense)
    for layer in (dense, sparse):
        state = layer.state_dict()
        state["weight"].mul_(0.5)
        state["bias"].add_(1.0)
    assert torch.equal(copy.deepcopy(sparse).dense_weight(), dense.weight)
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(sparse.state_dict()["weight"], dense.weight)

    state = other.state_dict()  # an old one, and a copy, are no longer the layer's
    copy.deepcopy(state)["weight"].zero_()
    with torch.no_grad():
        other.weight.mul_(2.0)
    state["weight"].zero_()
    assert other(x).abs().sum() > 0 and torch.equal(other.weight, 4 * sparse.weight)
    with torch.inference_mode():
        other.state_dict()
    other(x)


@pytest.mark.parametrize(
    "average",
    [
        lambda model: ModelEmaV2(model, decay=0.5),
        lambda model: ModelEmaV3(model, decay=0.5),
        lambda model: ModelEmaV3(model, decay=0.5, foreach=False),
        lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    ],
    ids=["timm", "timm foreach", "timm for loop", "torch"],
)
def test_moving_averages(average):
    """timm's write into state dicts, torch's into parameters."""
    dense = nn.Sequential(make("conv")[0], nn.Flatten(1), zeroed(nn.Linear(576, 3)))
    sparse = nn.Sequential(sparse_of(dense[0]), nn.Flatten(1), sparse_of(dense[2]))
    sparse = copy.deepcopy(sparse)
    averages = []
    for model in (dense, sparse):
        averaged = average(model)
        for factor in (2.0, 3.0, 4.0):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(factor)
            (averaged.update if hasattr(averaged, "update") else averaged.update_parameters)(model)
        averages.append(averaged.module)
    x = make("conv")[1]
    torch.testing.assert_close(averages[1](x), averages[0](x), rtol=1e-4, atol=1e-4)
    for key, tensor in averages[0].state_dict().items():
        torch.testing.assert_close(averages[1].state_dict()[key], tensor)


def test_load_errors():
    model = nn.Sequential(sparse_of(zeroed(nn.Linear(8, 6))))
    good = model.state_dict()
    before = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight: the checkpoint has shape \(6, 9\)"):
        model.load_state_dict(good | {"0.weight": torch.zeros(6, 9)})
    with pytest.raises(RuntimeError, match=r"0\.weight: \d+ nonzero weights of the checkpoint lie outside"):
        model.load_state_dict(good | {"0.weight": torch.ones(6, 8)})
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0\.weight"'):
        model.load_state_dict({"0.bias": good["0.bias"]})
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.bias"):
        model.load_state_dict(good | {"0.bias": torch.zeros(7)})
    assert torch.equal(model[0].weight, before)
    missing, unexpected = model.load_state_dict({"0.other": torch.zeros(1)}, strict=False)
    assert missing == ["0.weight", "0.bias"] and unexpected == ["0.other"]


def test_a_checkpoint_with_more_zeros_loads():
    """A weight that is zero now keeps its place: it may have been zero when it was saved."""
    sparse = sparse_of(zeroed(nn.Linear(8, 6), 0.5))
    state = sparse.state_dict()
    place = tuple(sparse.mask().nonzero()[0])
    state["weight"][place] = 0.0
    sparse.load_state_dict(state)
    assert sparse.mask()[place] and sparse.weight[0] == 0


@forms
def test_active_zeros(form):
    """A position of the mask whose weight is 0.0 is trained; one outside is not."""
    dense, x = make(form)
    mask = dense.weight != 0
    mask.view(-1)[(~mask).view(-1).nonzero()[:3, 0]] = True
    sparse = sparse_of(dense, mask)
    assert sparse.nnz == torch.count_nonzero(dense.weight) + 3 and torch.equal(sparse.mask(), mask)
    assert torch.equal(sparse.dense_weight(), dense.weight)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    step(sparse, x)
    optimizer.step()
    assert torch.count_nonzero(sparse.dense_weight()) > torch.count_nonzero(dense.weight)
    assert not sparse.dense_weight()[~mask].any()


@forms
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(form, how):
    dense, x = make(form)
    sparse = sparse_of(dense)
    if how == "deepcopy":
        copied = copy.deepcopy(sparse)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(sparse))
    else:
        file = io.BytesIO()
        torch.save(sparse, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert torch.equal(copied(x), sparse(x)) and str(copied) == str(sparse)
    assert copied.weight.data_ptr() != sparse.weight.data_ptr()
    assert torch.equal(copied.to_dense().weight, dense.weight)


@forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_run_on_the_reference_backend(form, dtype, caplog):
    dense, x = make(form)
    dense, x = dense.to(dtype), x.to(dtype)
    sparse = sparse_of(dense)
    with caplog.at_level(logging.WARNING):
        (y, grad_x), (want_y, want_grad_x) = step(sparse, x), step(dense, x)
        sparse(x)
    assert y.dtype == grad_x.dtype == sparse.weight.grad.dtype == dtype
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(y, want_y, **tolerance)
    torch.testing.assert_close(grad_x, want_grad_x, **tolerance)
    assert len(caplog.records) == 1 and "reference backend" in caplog.text and str(dtype).split(".")[1] in caplog.text
    assert sparse.native_reason() and sparse.native_reason(x)


@forms
def test_a_weight_whose_type_changes_is_reported(form, caplog):
    dense, x = make(form)
    sparse, x = sparse_of(dense), x.bfloat16()
    with caplog.at_level(logging.WARNING):
        sparse(x)  # natively
        assert not caplog.records
        sparse.bfloat16()(x)  # the same input
    assert len(caplog.records) == 1 and "reference backend" in caplog.text


@forms
def test_double_and_back(form):
    dense, x = make(form)
    sparse = sparse_of(dense)
    want = sparse(x)
    assert sparse.native_reason(x) is None
    sparse.double()
    torch.testing.assert_close(sparse(x.double()).float(), want, rtol=1e-4, atol=1e-5)
    sparse.float()
    assert sparse.native_reason(x) is None and torch.equal(sparse(x), want)


@pytest.mark.parametrize("form", ["linear", "Conv1D", "conv", "depthwise conv"])
@pytest.mark.parametrize("first", [False, True])
def test_autocast(form, first, caplog):
    """The sparse layer takes and gives bfloat16 as torch's do, behind a layer that gives it and with float32 input."""
    dense, x = make(form)
    sparse = sparse_of(copy.deepcopy(dense))
    before = nn.Conv2d(x.shape[1], x.shape[1], 1) if x.dim() == 4 else nn.Linear(x.shape[-1], x.shape[-1])
    if first:
        before = nn.BatchNorm2d(x.shape[1]) if x.dim() == 4 else nn.LayerNorm(x.shape[-1])
    results = []
    for layer in (sparse, dense):
        model = nn.Sequential(before, layer)
        model.zero_grad()
        with caplog.at_level(logging.WARNING), torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        y.float().square().mean().backward()
        weight = layer.weight.grad if layer is dense else layer.pattern.to_dense(layer.weight.grad)
        results.append((y, before.weight.grad.clone(), weight))
    (y, before_grad, grad), (want_y, want_before_grad, want_grad) = results
    assert y.dtype == want_y.dtype == torch.bfloat16 and grad.dtype == torch.float32
    torch.testing.assert_close(y, want_y, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(before_grad, want_before_grad, rtol=5e-2, atol=5e-2)
    grad = grad.t() if sparse.stored_transposed else grad
    torch.testing.assert_close(grad, want_grad * sparse.mask(), rtol=5e-2, atol=5e-2)
    assert not caplog.records


def test_unbatched_image():
    dense, x = make("conv")
    sparse = sparse_of(dense)
    y = sparse(x[0])
    assert y.shape == dense(x[0]).shape
    torch.testing.assert_close(y, dense(x[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (1,), (4,), (2, 3), (2, 1, 3, 2), (0,), (2, 0)])
def test_leading_shapes(leading):
    dense, _ = make("linear")
    sparse, x = sparse_of(dense), torch.randn(*leading, 20)
    y = sparse(x)
    assert y.shape == (*leading, 12)
    torch.testing.assert_close(y, dense(x), rtol=1e-4, atol=1e-5)
    y.sum().backward()


def test_an_input_that_does_not_fit():
    linear, conv = sparse_of(make("linear")[0]), sparse_of(make("conv")[0])
    with pytest.raises(ValueError, match="20 features"):
        linear(torch.randn(3, 21))
    with pytest.raises(ValueError, match="6 channels, the input has 5"):
        conv(torch.randn(2, 5, 9, 9))
    with pytest.raises(ValueError, match="four dimensions"):
        conv(torch.randn(2, 3, 6, 9, 9))


@pytest.mark.parametrize("form", ["linear", "Conv1D", "conv"])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters_stay_frozen(form, frozen):
    dense, x = make(form)
    getattr(dense, frozen).requires_grad_(False)
    sparse = sparse_of(dense)
    assert sparse.weight.requires_grad == (frozen != "weight") and sparse.bias.requires_grad == (frozen != "bias")
    _, grad_x = step(sparse, x)
    assert getattr(sparse, frozen).grad is None and grad_x is not None
    back = sparse.to_dense()
    assert back.weight.requires_grad == (frozen != "weight") and back.bias.requires_grad == (frozen != "bias")


@pytest.mark.parametrize("training", [True, False])
def test_keeps_its_mode(training):
    dense = make("conv")[0].train(training)
    assert sparse_of(dense).training == training == sparse_of(dense).to_dense().training


def test_hooks_are_called():
    sparse, calls = sparse_of(make("conv")[0]), []
    sparse.register_forward_pre_hook(lambda module, args: calls.append("before"))
    sparse.register_forward_hook(lambda module, args, output: calls.append("after"))
    sparse.register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("backward"))
    step(sparse, make("conv")[1])
    assert calls == ["before", "after", "backward"]


def test_no_nonzeros_at_all():
    for dense, x in ((nn.Linear(5, 3), torch.randn(4, 5)), (nn.Conv2d(5, 3, 3), torch.randn(2, 5, 4, 4))):
        nn.init.zeros_(dense.weight)
        sparse = sparse_of(dense)
        y, grad_x = step(sparse, x)
        assert sparse.nnz == 0 and sparse.sparsity == 1.0
        assert torch.equal(y, dense(x)) and not grad_x.any() and sparse.weight.grad.shape == (0, 1)
        torch.optim.AdamW(sparse.parameters()).step()


def test_a_padding_mode_without_sparse_form():
    with pytest.raises(ValueError, match="'reflect'"):
        SparseConv2d.from_dense(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))


def test_mask_of_another_shape():
    with pytest.raises(ValueError, match="mask shape"):
        SparseLinear.from_dense(nn.Linear(4, 3), torch.ones(4, 3, dtype=torch.bool))


class TestWeightDecay:
    """The nonzeros decay as the dense weight would, though they are one long column."""

    def model(self) -> nn.Module:
        return nn.Sequential(sparse_of(make("conv")[0]), nn.BatchNorm2d(8), sparse_of(make("linear")[0]))

    def names(self, model: nn.Module, parameters) -> set[str]:
        ids = {id(p) for p in parameters}
        return {name for name, p in model.named_parameters() if id(p) in ids}

    def test_rule_of_timm(self):
        model = self.model()
        plain, decayed = param_groups_weight_decay(model, weight_decay=0.1)
        assert plain["weight_decay"] == 0.0 and decayed["weight_decay"] == 0.1
        assert self.names(model, decayed["params"]) == {"0.weight", "2.weight"}
        assert self.names(model, plain["params"]) == {"0.bias", "1.weight", "1.bias", "2.bias"}

    def test_rule_of_transformers(self):
        model = self.model()
        assert set(Trainer.get_decay_parameter_names(None, model)) >= {"0.weight", "2.weight"}
        assert not {"0.bias", "2.bias"} & set(Trainer.get_decay_parameter_names(None, model))


def test_description_tells_the_form():
    assert "kernel_size=(3, 5), stride=(2, 3), padding=(1, 2)" in str(sparse_of(make("strided conv")[0]))
    assert "groups=8" in str(sparse_of(make("depthwise conv")[0]))
    assert "in_features=20, out_features=12, bias=True, sparsity=0." in str(sparse_of(make("linear")[0]))
