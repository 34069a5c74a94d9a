import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn

import sparse_ft
from sparse_ft import footprint, tune
from sparse_ft.bench import benchmark, compare_inference, variants
from sparse_ft.report.speed import plot_benchmark
from sparse_ft.steps import loss_of
from sparse_ft.tune import interleaved_medians


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
    assert set(result.variants) == {"sparse", *(("dense contiguous", "dense channels_last") if images else ("dense",))}
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


def test_opponents_in_bfloat16():
    result = sparse_ft.compare_steps(network(images=True), torch.randn(4, 3, 6, 6), steps=1, bf16=True)
    assert set(result.variants) == {
        "sparse", "sparse bf16", "dense contiguous", "dense channels_last", "dense bf16 channels_last"
    }  # fmt: skip
    assert result.dense_bf16_ms == result.variants["dense bf16 channels_last"]
    assert result.dense_ms == min(result.variants["dense contiguous"], result.variants["dense channels_last"])
    result = sparse_ft.compare_steps(network(images=False), torch.randn(4, 12), steps=1, bf16=True)
    assert {"dense", "dense bf16"} < set(result.variants)
    assert sparse_ft.compare_steps(network(images=False), torch.randn(4, 12), steps=1).dense_bf16_ms is None


def test_inference_trains_nothing():
    model = network(images=True)
    before = copy.deepcopy(model.state_dict())
    result = compare_inference(model, torch.randn(4, 3, 6, 6), steps=2)
    assert result.speedup > 0 and set(result.variants) == {"sparse", "dense contiguous", "dense channels_last"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.skipif(not footprint.can_measure(), reason="peak memory is measured on Linux")
class TestMemory:
    def test_of_a_step(self):
        # Large enough that what differs is far more than what a system varies by: which pages of the libraries it maps
        # beside those that are used, some 30 MB of the same process.
        model = nn.Sequential(nn.Linear(3000, 3000), nn.ReLU(), nn.Linear(3000, 10))
        sparse_ft.prune(model, 0.9, ignore=["2"])
        sparse_ft.convert(model, policy="always")
        sparse, dense = variants(model, torch.randn(50, 3000))
        ours = footprint.measure_footprint(sparse, optimizer="adamw")
        theirs = footprint.measure_footprint(dense, optimizer="adamw", keep_memory=True)
        left = 4 * (3000 + 10 * 3000 + 10)  # bytes of what has no zeros
        assert ours.weights == ours.gradients == 4 * 900_000 + left and theirs.weights == 4 * 9_000_000 + left
        # AdamW keeps two moments of each weight, and counts the steps of each tensor.
        assert ours.optimizer == 2 * ours.weights + 4 * 4 and theirs.optimizer == 2 * theirs.weights + 4 * 4
        assert ours.state == ours.weights * 4 + 16
        assert 3 * 4 * 900_000 < ours.indices < 4 * 4 * 900_000 and theirs.indices == 0
        assert theirs.peak - theirs.before > 3 * 36_000_000  # gradients and two moments
        assert 0 < ours.before < ours.peak < theirs.peak

    def test_of_a_step_that_fails(self):
        sparse = next(variants(network(images=False), torch.randn(4, 13)))
        with pytest.raises(RuntimeError, match=r"memory of the step \(sparse\) could not be measured: .*12 features"):
            footprint.measure_footprint(sparse)


@pytest.fixture(scope="module")
def bench():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = [nn.Linear(60, 60) for _ in range(3)]
    model = nn.Sequential(*layers, nn.Linear(60, 5))
    sparse_ft.prune(model, 0.9, ignore=["3"])
    report = sparse_ft.convert(model, policy="always")
    # Times as `convert` would have measured them, two of three layers of one shape alike.
    times = [(1.0, 0.5), (1.0, 0.5), (2.0, 0.25), (None, None)]
    report.layers = [
        replace(layer, dense_ms=dense, sparse_ms=sparse)
        for layer, (dense, sparse) in zip(report.layers, times, strict=True)
    ]
    return benchmark(model, torch.randn(4, 60), report, title="three layers", steps=1, bf16=True, memory=False)


class TestBenchmark:
    def test_says_everything(self, bench):
        text = str(bench)
        assert text.startswith("three layers\n\n3 of 4 layers run sparse (policy always)")
        assert "all else in the step" in text and "8.00" in text and "training step: dense" in text
        content = json.loads(json.dumps(bench.to_dict()))
        assert [layer["dense_ms"] for layer in content["layers"]] == [1.0, 1.0, 2.0, None]
        assert {"sparse", "dense", "dense bf16"} <= set(content["step"]["variants"]) and content["memory"] == {}

    def test_memory_stands_beside_the_times(self, bench):
        footprints = {
            name: footprint.Footprint(2**30, 2**29, 2**20, 2**20, 2**21, 2**19 if name == "sparse" else 0)
            for name in bench.steps.variants
        }
        text = str(replace(bench, memory=footprints))
        assert "1024" in text and "sparse indices" in text and "512 MB or more" in text and "4.0" in text

    def test_a_model_left_dense(self, bench):
        report = sparse_ft.ConversionReport("auto", bench.conversion.layers, note="left dense: 1 ms, 2 ms")
        report.layers = [replace(layer, converted=False) for layer in report.layers]
        result = benchmark(nn.Linear(2, 2), torch.randn(1, 2), report, title="dense")
        text = str(result)
        assert "left dense: 1 ms, 2 ms" in text and text.endswith("the training step is the dense one")
        assert result.to_dict()["step"] is None

    @pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
    def test_is_drawn(self, bench, tmp_path, suffix):
        plot_benchmark(bench, tmp_path / f"bench.{suffix}")
        content = (tmp_path / f"bench.{suffix}").read_bytes()
        assert content.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])
        if suffix == "svg":
            plot_benchmark(replace(bench, steps=None), tmp_path / "layers.svg")
            assert len((tmp_path / "layers.svg").read_bytes()) < len(content)

    def test_nothing_to_draw(self, bench, tmp_path):
        empty = replace(bench, conversion=sparse_ft.ConversionReport("always"), steps=None)
        with pytest.raises(ValueError, match="nothing to draw"):
            plot_benchmark(empty, tmp_path / "bench.png")


def test_loss_is_the_models_own_where_it_has_one():
    x = torch.tensor([3.0, -1.0])
    assert loss_of(x) == loss_of((x, None)) == 5.0
    assert loss_of({"loss": torch.tensor(2.0), "logits": x}) == 2.0


def test_variants_take_turns():
    calls = []
    medians = interleaved_medians({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4)
    assert set(medians) == {"a", "b"} and calls[-8:] == ["a", "b"] * 4


def test_a_turn_of_several_runs_does_not_count_its_first(monkeypatch):
    seconds = iter([0.06, 0.02, 0.03, 0.06, 0.03, 0.04, 0.2])  # two turns of three runs, one of a single run
    monkeypatch.setattr(tune, "_seconds", lambda run: next(seconds))
    medians = interleaved_medians({"a": lambda: None}, rounds=3, turn_s=0.1)
    assert medians == {"a": 0.03} and next(seconds, None) is None
