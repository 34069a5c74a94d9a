"""What convert decides, says and leaves alone."""

import copy
import itertools
import json

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from transformers.pytorch_utils import Conv1D
from zoo import bert, classified, gpt2, image, small_resnet

import sparse_ft
from sparse_ft import conversion, tune
from sparse_ft.nn import LayoutNorm, SparseConv2d, SparseLinear, SparseModule


def sparsify(module: nn.Module, sparsity: float = 0.9) -> nn.Module:
    """Zeros in every weight of two dimensions and more."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.masked_fill_(torch.rand(parameter.shape) < sparsity, 0.0)
    return module


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


def reasons(report: sparse_ft.ConversionReport) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.layers}


@pytest.fixture
def timings(monkeypatch):
    """Timings that are said, not measured: a dense layer takes 1 ms, a sparse one `sparse_ms`; a whole dense model
    takes 100 ms, with sparse layers `whole_ms(those layers)`."""

    class Timings:
        sparse_ms = 0.5
        spread = 0.0

        def __init__(self):
            self.calls: list[tuple[str, bool]] = []
            self.whole_calls: list[list[str]] = []

        def whole_ms(self, layers: list[SparseModule]) -> float:
            return 50.0

        def layer(self, layer, shape, *, inside, trained, bf16=False):
            self.calls.append((type(layer).__name__, inside))
            self.trained = trained
            return tune.Timing(1.0, self.sparse_ms, self.spread)

        def whole(self, dense, sparse, batch, *, bf16=False):
            layers = [module for module in sparse.modules() if isinstance(module, SparseModule)]
            assert not any(isinstance(module, SparseModule) for module in dense.modules())
            self.whole_calls.append([type(layer).__name__ for layer in layers])
            return tune.Timing(100.0, self.whole_ms(layers), self.spread)

    timings = Timings()
    monkeypatch.setattr(conversion, "time_layer", timings.layer)
    monkeypatch.setattr(conversion, "time_step", timings.whole)
    return timings


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"policy": "sometimes"}, 'policy must be "auto" or "always", not \'sometimes\''),
            ({"min_sparsity": 1.5}, r"min_sparsity must be in \[0, 1\], not 1.5"),
            ({"min_sparsity": -0.1}, r"min_sparsity must be in \[0, 1\], not -0.1"),
            ({"ignore": ["layer1.0.conv9"]}, r"'layer1.0.conv9' matches no .*did you mean 'layer1.0.conv"),
            ({"ignore": ["re:nothing.*"]}, "'re:nothing.*' matches no"),
            ({"ignore": "fc"}, "ignore must be a list of layer names, not the text 'fc'"),
            ({"layers": ["layer9"]}, "no such layers to convert: layer9"),
            ({"masks": {"fc.weight": torch.ones(3, 3) > 0}}, r"mask of fc.weight has shape \(3, 3\)"),
        ],
    )
    def test_errors(self, arguments, message):
        model = sparsify(small_resnet())
        before = str(model)
        with pytest.raises(ValueError, match=message):
            sparse_ft.convert(model, **{"policy": "always", **arguments})
        assert str(model) == before

    def test_auto_without_an_input(self):
        with pytest.raises(ValueError, match="give example_inputs"):
            sparse_ft.convert(sparsify(small_cnn()))

    def test_nothing_to_convert_needs_no_input(self):
        report = sparse_ft.convert(small_cnn())
        assert not report.converted and {layer.reason for layer in report.layers} == {"sparsity below 50%"}

    def test_a_mask_that_would_lose_weights(self):
        model = sparsify(small_cnn())
        mask = model[9].weight != 0
        mask[tuple(mask.nonzero()[0])] = False
        with pytest.raises(ValueError, match=r"mask of 9\.weight leaves out 1 nonzero weights"):
            sparse_ft.convert(model, policy="always", masks={"9.weight": mask})

    def test_min_sparsity(self):
        model = nn.Sequential(sparsify(nn.Linear(50, 50), 0.6), sparsify(nn.Linear(50, 50), 0.95), nn.Linear(50, 50))
        assert sparse_ft.convert(copy.deepcopy(model), policy="always").converted == ["0", "1"]
        assert sparse_ft.convert(copy.deepcopy(model), policy="always", min_sparsity=0.9).converted == ["1"]
        report = sparse_ft.convert(copy.deepcopy(model), policy="always", min_sparsity=0.0)
        assert report.converted == ["0", "1"] and reasons(report)["2"] == "no zeros"

    @pytest.mark.parametrize("ignore", [["4", "9"], ["re:[49]"], ["4.weight", "module.9"]])
    def test_ignore(self, ignore):
        report = sparse_ft.convert(sparsify(small_cnn()), policy="always", ignore=ignore)
        assert report.converted == ["0", "3"]
        assert reasons(report)["4"] == reasons(report)["9"] == "ignored"

    def test_chosen_layers(self):
        model = sparsify(small_cnn())
        report = sparse_ft.convert(model, layers=["4"])
        assert report.converted == ["4"] and isinstance(model[4], SparseConv2d) and type(model[9]) is nn.Linear

    def test_chosen_layers_that_have_no_sparse_form(self):
        model = sparsify(gpt2())
        with pytest.raises(ValueError, match="'lm_head' cannot be converted: tied to transformer.wte.weight"):
            sparse_ft.convert(model, layers=["lm_head"])
        with pytest.raises(ValueError, match="Conv1d has no sparse form"):
            sparse_ft.convert(nn.Sequential(sparsify(nn.Conv1d(3, 3, 1))), layers=["0"])


class TestWhatIsLeftDense:
    def test_tied_weights(self):
        model = sparsify(gpt2())
        report = sparse_ft.convert(model, policy="always")
        assert reasons(report)["lm_head"] == "tied to transformer.wte.weight"
        assert model.lm_head.weight is model.transformer.wte.weight
        pair = sparsify(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)))
        pair[2].weight = pair[0].weight
        report = sparse_ft.convert(pair, policy="always")
        assert report.converted == ["1"]
        assert reasons(report)["0"] == "tied to 2.weight" and reasons(report)["2"] == "tied to 0.weight"

    def test_children_whose_weights_are_read(self):
        model = nn.Sequential(
            sparsify(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)), sparsify(nn.Linear(16, 16))
        ).eval()
        x = torch.randn(2, 5, 16)
        with torch.no_grad():
            want = model(x)  # the fused path, which takes the weights of linear1 and linear2
            report = sparse_ft.convert(model, policy="always")
            assert report.converted == ["1"]
            torch.testing.assert_close(model(x), want)
        assert "reads its weight" in reasons(report)["0.linear1"]
        assert "reads its weight" in reasons(report)["0.self_attn.out_proj"]
        attention = sparsify(nn.ModuleDict({"a": nn.MultiheadAttention(16, 2)}))
        assert not sparse_ft.convert(attention, policy="always").converted

    def test_weights_computed_from_others(self):
        model = sparsify(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)))
        model.append(nn.LazyLinear(6))
        torch.nn.utils.prune.random_unstructured(model[0], "weight", 0.8)
        torch.nn.utils.parametrizations.weight_norm(model[1])
        report = sparse_ft.convert(model, policy="always")
        assert report.converted == ["2"]
        assert all("torch.nn.utils.prune.remove" in reasons(report)[name] for name in ("0", "1"))
        assert reasons(report)["3"] == "its weight is not initialised yet"
        assert "not initialised" in str(report) and json.dumps(report.to_dict())
        model(torch.randn(3, 6)).sum().backward()
        torch.nn.utils.prune.remove(model[0], "weight")
        assert sparse_ft.convert(model, policy="always").converted == ["0"]

    def test_forms_without_sparse_counterpart(self):
        class Own(nn.Conv2d):
            pass

        model = sparsify(
            nn.ModuleDict(
                {
                    "reflect": nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
                    "own": Own(4, 4, 3),
                    "conv1d": nn.Conv1d(4, 4, 3),
                    "conv3d": nn.Conv3d(4, 4, 3),
                    "conv2d": nn.Conv2d(4, 4, 3),
                    "Conv1D": Conv1D(4, 4),
                }
            )
        )
        report = sparse_ft.convert(model, policy="always")
        assert report.converted == ["conv2d", "Conv1D"]
        assert reasons(report)["reflect"] == "padding mode 'reflect' has no sparse form"
        assert reasons(report)["own"] == "Own has no sparse form"
        assert reasons(report)["conv3d"] == "Conv3d has no sparse form"

    def test_a_model_that_is_one_layer(self):
        layer = sparsify(nn.Linear(8, 8))
        report = sparse_ft.convert(layer, policy="always")
        assert not report.converted and "from_dense" in report.layers[0].reason
        sparse = SparseLinear.from_dense(layer)
        assert torch.equal(sparse_ft.to_dense(sparse).weight, layer.weight)


def test_a_module_used_twice():
    shared = sparsify(nn.Linear(10, 10))
    model = nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared))
    x = torch.randn(4, 10)
    dense = copy.deepcopy(model)
    assert sparse_ft.convert(model, policy="always").converted == ["0"]
    assert model[0] is model[2][0] and isinstance(model[0], SparseLinear)
    torch.testing.assert_close(model(x), dense(x))
    model(x).sum().backward()
    dense(x).sum().backward()
    torch.testing.assert_close(model[0].pattern.to_dense(model[0].weight.grad), dense[0].weight.grad * model[0].mask())
    sparse_ft.to_dense(model)
    assert model[0] is model[2][0] and type(model[0]) is nn.Linear


def test_hooks_move_with_the_layer():
    model, calls = sparsify(small_cnn()), []
    forward = model[4].register_forward_hook(lambda module, args, output: calls.append("forward"))
    model[4].register_full_backward_hook(lambda module, grad_in, grad_out: calls.append(len(grad_in)))
    model[4].register_forward_pre_hook(lambda module, args, kwargs: calls.append("pre"), with_kwargs=True)
    sparse_ft.convert(model, image(8), policy="auto")  # hooks of the user are not called by the measuring of a layer
    sparse_ft.to_dense(model)  # whatever was the faster
    sparse_ft.convert(model, layers=["4"])
    sparse_ft.to_dense(model)
    sparse_ft.convert(model, layers=["4"])
    calls.clear()
    model(image(8)).sum().backward()
    assert calls == ["pre", "forward", 1]
    forward.remove()
    calls.clear()
    model(image(8)).sum().backward()
    assert calls == ["pre", 1]


def test_converting_again_adds_what_is_new():
    model = sparsify(small_cnn())
    assert sparse_ft.convert(model, layers=["0"]).converted == ["0"]
    report = sparse_ft.convert(model, policy="always")
    assert report.converted == ["3", "4", "9"] and {layer.kind for layer in report.layers} == {"Conv2d", "Linear"}
    assert not sparse_ft.convert(model, policy="always").layers


def test_norms_follow_sparse_convolutions():
    model = sparsify(small_cnn())
    sparse_ft.convert(model, policy="always", ignore=["0", "3", "4"])
    assert type(model[1]) is nn.BatchNorm2d
    sparse_ft.convert(model, policy="always")
    assert isinstance(model[1], LayoutNorm)


def test_wrapped_models_keep_their_names():
    model = nn.DataParallel(sparsify(small_cnn()))
    assert sparse_ft.convert(model, policy="always").converted == ["0", "3", "4", "9"]
    assert isinstance(model.module[0], SparseConv2d)
    assert sparse_ft.to_dense(model) is model and type(model.module[0]) is nn.Conv2d


def test_report():
    report = sparse_ft.convert(sparsify(small_cnn()), policy="always", ignore=["9"])
    text = str(report)
    assert text.startswith("3 of 4 layers run sparse (policy always)") and "12x8x1x1" in text and "ignored" in text
    described = json.loads(json.dumps(report.to_dict()))
    assert [layer["name"] for layer in described["layers"]] == ["0", "3", "4", "9"]
    first = report.layers[0]
    assert first.kind == "Conv2d" and first.shape == (8, 3, 3, 3) and first.converted
    assert first.nnz == 216 - round(first.sparsity * 216)


class TestAuto:
    def test_keeps_the_faster_form(self, timings):
        model = sparsify(small_cnn())
        report = sparse_ft.convert(model, image(8))
        assert report.converted == ["0", "3", "4", "9"]
        assert reasons(report)["0"] == "measured faster" and report.layers[0].sparse_ms == 0.5
        timings.sparse_ms = 2.0
        model = sparsify(small_cnn())
        report = sparse_ft.convert(model, image(9))
        assert not report.converted and reasons(report)["0"] == "measured slower than dense"
        assert not any(isinstance(module, SparseModule) for module in model.modules())
        assert type(model[1]) is nn.BatchNorm2d

    def test_a_depthwise_layer_joins_its_neighbours(self, timings):
        model = small_cnn()
        for i in (0, 4):
            sparsify(model[i])
        x, weight = image(8), model[3].weight.detach().clone()
        want = model.eval()(x)
        report = sparse_ft.convert(model, x)
        assert report.converted == ["0", "3", "4"]
        assert ("SparseConv2d", True) in timings.calls  # against a dense form between sparse ones
        assert model[3].sparsity == 0.0 and torch.equal(model[3].dense_weight(), weight)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("trained", [True, False])
    def test_the_first_convolution_joins(self, timings, trained):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), sparsify(nn.Conv2d(8, 8, 3))).requires_grad_(trained)
        weight = model[0].weight.detach().clone()
        assert sparse_ft.convert(model, image(8)).converted == ["0", "1"]
        assert model[0].sparsity == 0.0 and torch.equal(model[0].dense_weight(), weight)

    def test_a_depthwise_layer_alone_does_not(self, timings):
        model = small_cnn()
        sparsify(model[9])
        report = sparse_ft.convert(model, image(8))
        assert report.converted == ["9"] and reasons(report)["3"] == "sparsity below 50%"
        assert not any(inside for _, inside in timings.calls)

    def test_a_layer_that_is_not_called(self, timings):
        class Partly(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.unused = sparsify(nn.Linear(6, 6)), sparsify(nn.Linear(6, 6))

            def forward(self, x):
                return self.used(input=x)  # by keyword

        model = Partly()
        report = sparse_ft.convert(model, torch.randn(3, 6))
        assert report.converted == ["used"] and reasons(report)["unused"] == "not called with the example inputs"

    def test_other_types_are_not_measured(self, timings):
        report = sparse_ft.convert(sparsify(nn.Sequential(nn.Linear(6, 6))).double(), torch.randn(3, 6).double())
        assert not timings.calls and "float64" in report.layers[0].reason

    @pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping", "none"])
    def test_forms_of_example_inputs(self, timings, kind):
        if kind in ("mapping", "none"):  # transformers models know what they take
            report = sparse_ft.convert(sparsify(bert()), classified() if kind == "mapping" else None)
        else:
            x = image(32, 2)
            report = sparse_ft.convert(sparsify(small_resnet()), x if kind == "tensor" else (x,))
        assert len(report.converted) > 5

    def test_each_distinct_layer_is_measured_once(self, timings, monkeypatch):
        model = sparsify(nn.Sequential(*[nn.Linear(40, 40) for _ in range(4)]))
        with torch.no_grad():
            for layer in model:
                layer.weight.copy_(model[0].weight)
        sparse_ft.convert(copy.deepcopy(model), torch.randn(3, 40))
        assert len(timings.calls) == 1
        sparse_ft.convert(copy.deepcopy(model), torch.randn(3, 40))  # from the cache of the first
        assert len(timings.calls) == 1
        sparse_ft.convert(copy.deepcopy(model), torch.randn(4, 40))  # another shape
        assert len(timings.calls) == 2
        torch.set_num_threads(2)
        sparse_ft.convert(copy.deepcopy(model), torch.randn(4, 40))
        assert len(timings.calls) == 3
        monkeypatch.setenv("SPARSE_FT_CACHE", str(tune.TimingCache().path.parent / "other"))
        sparse_ft.convert(copy.deepcopy(model), torch.randn(4, 40))
        assert len(timings.calls) == 4

    @pytest.mark.parametrize(
        "content", [b"", b"{", b"[1, 2]", b'{"a": 3}', b'{"a": ["x", "y"]}', b"\xff\xfe\x00", b"null"]
    )
    def test_a_corrupt_cache_is_measured_anew(self, timings, content):
        cache = tune.TimingCache()
        cache.path.parent.mkdir(parents=True)
        cache.path.write_bytes(content)
        model = sparsify(nn.Sequential(nn.Linear(40, 40)))
        sparse_ft.convert(copy.deepcopy(model), torch.randn(3, 40))
        sparse_ft.convert(copy.deepcopy(model), torch.randn(3, 40))
        assert len(timings.calls) == 1 and json.loads(cache.path.read_text())

    def test_a_cache_that_cannot_be_written(self, timings, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("not a folder")
        monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "file"))
        for _ in range(2):
            model = sparsify(nn.Sequential(nn.Linear(40, 40)))
            assert sparse_ft.convert(model, torch.randn(3, 40)).converted == ["0"]
        assert len(timings.calls) == 2

    @pytest.mark.parametrize(
        ("timing", "doubtful"),
        [
            ((1.0, 0.4, 0.05), False),
            ((1.0, 0.4, 0.3), False),  # it varies, but not by enough to be anything but faster
            ((1.0, 0.4, 0.6), True),
            ((1.0, 0.95, 0.09), False),
            ((1.0, 1.2, 0.2), True),
        ],
    )
    def test_a_doubtful_timing_is_not_kept(self, timing, doubtful):
        timing = tune.Timing(*timing)
        assert timing.doubtful is doubtful
        cache, calls = tune.TimingCache(), []

        def measure():
            calls.append(1)
            return timing

        for _ in range(2):  # the same layer twice in a model is measured once, whatever came out
            assert cache.get("layer", measure) == timing
        cache.save()
        tune.TimingCache().get("layer", measure)
        assert len(calls) == (2 if doubtful else 1)

    def test_a_doubtful_timing_in_the_file_is_distrusted(self):
        cache = tune.TimingCache()
        cache.path.parent.mkdir(parents=True)
        cache.path.write_text(json.dumps({"a": [1.0, 0.9, 0.5], "b": [1.0, 0.9, 0.01]}))
        cache = tune.TimingCache()
        new = tune.Timing(2.0, 2.0)
        assert cache.get("a", lambda: new) is new and cache.get("b", pytest.fail).dense_ms == 1.0

    def test_a_model_that_is_not_trained_is_measured_forward(self, timings):
        report = sparse_ft.convert(sparsify(small_cnn()).requires_grad_(False), image(8))
        assert timings.trained is False and "takes (forward) 100.0 ms dense" in report.note
        sparse_ft.convert(sparsify(small_cnn()), image(8))
        assert timings.trained is True

    def test_other_code_has_timings_of_its_own(self, monkeypatch):
        before = tune.TimingCache().path
        assert tune.TimingCache().path == before
        monkeypatch.setattr(tune, "_code", lambda: "rebuilt")
        assert tune.TimingCache().path != before

    def test_processes_add_to_one_cache(self):
        one, other = tune.TimingCache(), tune.TimingCache()
        layers = [SparseLinear.from_dense(sparsify(nn.Linear(n, 8))) for n in (20, 30)]
        keys = [
            tune.layer_key(layer, torch.Size((2, layer.in_features)), inside=False, trained=True) for layer in layers
        ]
        assert keys[0] != keys[1]
        for cache, key in zip((one, other), keys, strict=True):
            cache.get(key, lambda: tune.Timing(3.0, 2.0, 0.05))
            cache.save()
        third = tune.TimingCache()
        for key in keys:
            assert third.get(key, pytest.fail) == tune.Timing(3.0, 2.0, 0.05)
        assert [path.name for path in third.path.parent.iterdir()] == [third.path.name]  # no temporary file is left


class TestWholeModel:
    """Layers that gain alone may lose together, by what lies between them."""

    def test_a_model_that_gains_is_converted(self, timings):
        report = sparse_ft.convert(sparsify(small_cnn()), image(8))
        assert len(timings.whole_calls) == 1 and len(report.converted) == 4
        assert report.step == tune.Timing(100.0, 50.0)
        assert "100.0 ms dense, 50.0 ms sparse: 2.00 times as fast" in report.note and report.note in str(report)
        assert json.loads(json.dumps(report.to_dict()))["step"]["dense_ms"] == 100.0

    def test_a_model_that_does_not_gain_is_left_dense(self, timings):
        timings.whole_ms = lambda layers: 99.0
        model = sparsify(small_cnn())
        before, calls = str(model), []
        model[4].register_forward_hook(lambda module, args, output: calls.append(module))
        report = sparse_ft.convert(model, image(8))
        assert not report.converted and str(model) == before
        assert timings.whole_calls == [["SparseConv2d"] * 3 + ["SparseLinear"], ["SparseLinear"]]
        assert set(reasons(report).values()) == {"measured faster, but the whole model was not"}
        assert report.note == (
            "left dense: the whole model takes (forward and backward) 100.0 ms dense, "
            "99.0 ms with 4 sparse layers and 99.0 ms with 1 sparse layers"
        )
        calls.clear()
        model(image(8))
        assert calls == [model[4]]
        sparse_ft.convert(model, image(8))  # known from the cache
        assert len(timings.whole_calls) == 2

    def test_convolutions_that_cost_more_than_they_gain(self, timings):
        timings.whole_ms = lambda layers: 110.0 if any(isinstance(m, SparseConv2d) for m in layers) else 80.0
        model = sparsify(small_cnn())
        report = sparse_ft.convert(model, image(8))
        assert report.converted == ["9"] and type(model[1]) is nn.BatchNorm2d
        assert "1.25 times as fast; convolutions are left dense: 110.0 ms with 4 sparse layers" in report.note

    def test_what_the_timing_depends_on(self, timings):
        def converted(model=None, x=None):
            torch.manual_seed(0)
            sparse_ft.convert(sparsify(small_cnn()) if model is None else model, image(8) if x is None else x)
            return len(timings.whole_calls)

        assert converted() == 1 and converted() == 1
        assert converted(x=image(9)) == 2
        frozen = sparsify(small_cnn())
        frozen[0].requires_grad_(False)
        assert converted(frozen) == 3
        assert converted(sparsify(small_cnn(), 0.6)) == 4
        assert converted(nn.Sequential(*sparsify(small_cnn()), nn.ReLU())) == 5
        torch.set_num_threads(2)
        assert converted() == 6

    def test_a_model_that_cannot_be_timed_says_so(self, monkeypatch, caplog):
        class Refuses(nn.Sequential):
            def forward(self, x):
                if self.training:
                    raise RuntimeError("not in training mode\nnor elsewhere")
                return super().forward(x)

        fast = tune.Timing(1.0, 0.5)
        monkeypatch.setattr(conversion, "time_layer", lambda *arguments, **options: fast)
        report = sparse_ft.convert(Refuses(*sparsify(small_cnn())).eval(), image(8))
        assert len(report.converted) == 4 and report.step is None
        assert report.note.endswith("only its layers (RuntimeError: not in training mode)")
        assert "could not be timed" in caplog.text

    def test_always_does_not_measure(self, timings):
        timings.whole_ms = lambda layers: 1000.0
        assert len(sparse_ft.convert(sparsify(small_cnn()), image(8), policy="always").converted) == 4
        assert not timings.whole_calls

    @pytest.mark.parametrize("trained", [True, False])
    def test_measuring(self, trained):
        dense = sparsify(small_cnn()).requires_grad_(trained)
        sparse = copy.deepcopy(dense)
        sparse_ft.convert(sparse, policy="always")
        timing = tune.time_step(dense, sparse, image(8))
        assert timing.dense_ms > 0 and timing.sparse_ms > 0 and timing.spread >= 0
        assert all(parameter.grad is None for parameter in dense.parameters())


class TestDuel:
    """A clock that each run advances stands for the machine."""

    @pytest.fixture
    def clock(self, monkeypatch):
        class Clock:
            now = 0.0
            runs: list[str] = []

            def run(self, name, *seconds):
                turns = itertools.chain(seconds, itertools.repeat(seconds[-1]))

                def run():
                    self.now += next(turns)
                    self.runs.append(name)

                return run

        clock = Clock()
        clock.runs = []
        monkeypatch.setattr(tune.time, "perf_counter", lambda: clock.now)
        return clock

    def test_a_clear_verdict_takes_two_pairs(self, clock):
        timing = tune.duel({"a": clock.run("a", 2.0), "b": clock.run("b", 1.0)}, clock.run("s", 0.4), budget_s=100)
        assert clock.runs == ["a", "b", "s"] * 2 + ["b", "s"]  # warm-up, a round of all, then the faster dense form
        assert (timing.dense_ms, timing.sparse_ms) == (1000.0, pytest.approx(400.0)) and timing.spread < 1e-9

    def test_long_runs_need_no_warm_up(self, clock):
        timing = tune.duel({"a": clock.run("a", 30.0)}, clock.run("s", 10.0), budget_s=6)
        assert clock.runs == ["a", "s"] * 2 and timing.dense_ms == 30_000

    def test_a_close_race_takes_the_budget(self, clock):
        timing = tune.duel({"a": clock.run("a", 1.0)}, clock.run("s", 0.95), budget_s=10)
        assert len(clock.runs) == 2 * (2 + 6)  # warm-up, first pair, pairs for ten seconds
        assert timing.spread < 1e-9 and not timing.doubtful
        clock.runs.clear()
        tune.duel({"a": clock.run("a", 1e-6)}, clock.run("s", 1e-6), budget_s=10)
        assert len(clock.runs) == 2 * (1 + 15)

    def test_one_disturbed_pair_decides_nothing(self, clock):
        sparse = clock.run("s", 0.5, 0.5, 9.0, 0.5)
        timing = tune.duel({"a": clock.run("a", 1.0)}, sparse, budget_s=30)
        assert timing.sparse_ms == 500.0 and timing.dense_ms == 1000.0 and not timing.doubtful

    def test_a_restless_machine_is_doubted(self, clock):
        sparse = clock.run("s", *[0.5, 0.5, 3.0, 0.7, 2.0] * 4)
        assert tune.duel({"a": clock.run("a", 1.0)}, sparse, budget_s=30).doubtful


class TestLeavesAlone:
    """Measuring runs the model and its layers; nothing of that may be seen afterwards."""

    def snapshot(self, model: nn.Module) -> dict:
        return {
            "modes": [module.training for module in model.modules() if not list(module.children())][:6],
            "buffers": {n: b.clone() for n, b in model.named_buffers() if "running" in n or "num_batches" in n},
            "gradients": {
                n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters() if p.dim() == 1
            },
            "trained": {n: p.requires_grad for n, p in model.named_parameters()},
            "random": torch.get_rng_state(),
        }

    def assert_same(self, one, other):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, dict):
                self.assert_same(value, other[key])
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, other[key]), key
            else:
                assert value == other[key], key

    @pytest.mark.parametrize("policy", ["auto", "always"])
    def test_everything_but_the_weights(self, policy):
        model = sparsify(small_cnn()).train()
        model[1].eval()
        model[4].bias.requires_grad_(False)
        model[0].weight.requires_grad_(False)
        model(image(8)).sum().backward()
        before = self.snapshot(model)
        assert before["gradients"]["9.bias"] is not None
        sparse_ft.convert(model, image(8) if policy == "auto" else None, policy=policy)
        after = self.snapshot(model)
        if policy == "auto":  # the snapshot itself made a batch
            torch.set_rng_state(before["random"])
            image(8)
            before["random"] = torch.get_rng_state()
        self.assert_same(before, after)

    def test_without_gradients_around(self):
        with torch.no_grad():
            sparse_ft.convert(sparsify(small_cnn()), image(8))

    def test_an_input_the_model_does_not_take(self):
        model = sparsify(small_cnn()).train()
        with pytest.raises(RuntimeError):
            sparse_ft.convert(model, torch.randn(2, 5, 8, 8))
        assert all(module.training and not module._forward_pre_hooks for module in model.modules())

    def test_training_goes_on_with_the_same_dropout(self):
        losses = []
        for policy in ("auto", "always"):
            torch.manual_seed(3)
            model = nn.Sequential(nn.Linear(20, 20), nn.Dropout(0.5), nn.Linear(20, 4))
            sparsify(model)
            x = torch.randn(8, 20)
            sparse_ft.convert(model, x, policy=policy)
            losses.append(model(x).square().sum().item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_measuring_gives_times_of_both_forms():
    layer = SparseConv2d.from_dense(sparsify(nn.Conv2d(8, 8, 3, padding=1)))
    for inside, trained in itertools.product((False, True), repeat=2):
        timing = tune.time_layer(layer, torch.Size((4, 8, 6, 6)), inside=inside, trained=trained)
        assert timing.dense_ms > 0 and timing.sparse_ms > 0
    timing = tune.time_layer(SparseLinear.from_dense(sparsify(nn.Linear(8, 8))), torch.Size((4, 8)))
    assert timing.dense_ms > 0 and timing.sparse_ms > 0
    assert layer.weight.grad is None and layer.bias.grad is None


def test_to_dense_of_a_dense_model_changes_nothing():
    model = small_cnn()
    before = str(model)
    assert sparse_ft.to_dense(model) is model and str(model) == before


def test_measuring_leaves_out_a_layout_in_which_torch_crashes():
    # The backward pass of torch's own strided 1x1 convolutions of few channels ends the process in channels_last.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 1, stride=2), nn.ReLU())
    model.append(nn.Conv2d(16, 16, 3))
    sparse_ft.prune(model, 0.9)
    report = sparse_ft.convert(model, torch.randn(16, 3, 56, 56))
    assert {layer.name: layer.dense_ms is not None for layer in report.layers}["2"]
    dense = nn.Sequential(nn.Conv2d(8, 16, 1, stride=2), nn.Conv2d(16, 16, 3))
    sparse_ft.prune(dense, 0.9, ignore=["0"])
    sparse_ft.convert(dense, policy="always")  # the first one stays dense, between layouts
    dense(torch.randn(16, 8, 56, 56)).sum().backward()
    assert dense[0].weight.grad.isfinite().all()


def test_an_image_has_no_gradient_in_a_timing():
    for channels, wanted in ((3, False), (8, True)):
        seen = []
        layer = nn.Conv2d(channels, 4, 1)
        layer.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0].requires_grad))
        tune._training(layer, torch.randn(2, channels, 4, 4), bf16=False)()
        assert all(each is wanted for each in seen) and seen
