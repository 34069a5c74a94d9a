"""The cases of `make bench` run, and their figures fill docs/benchmarks.md."""

import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch

import sparse_ft

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import bench  # noqa: E402
from benchmarks import channels, depthwise, inference, kernels, memory, models, page, plain, swat, training  # noqa: E402
from benchmarks.case import Case, Settings  # noqa: E402
from benchmarks.machine import machine  # noqa: E402

SETTINGS = Settings(threads=1, rounds=1)
TINY = models.Workload("test_resnet", 0.95, 2, 32)
MODULES = (kernels, depthwise, training, inference, memory, plain, swat, channels)
CASES = [case for module in MODULES for case in module.cases()]


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "timings"))
    monkeypatch.setattr(kernels, "ROUNDS", 1)
    monkeypatch.setitem(models.TITLES, "test_resnet", "tiny")


def test_cases_have_names_of_their_own():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) == 37
    assert len([name for name in names if re.match(r"train/.*-70-", name)]) == 6


def _not_installed(shape, dense):
    raise ImportError("left out here")


@pytest.fixture(scope="module")
def figures():
    """Of tiny networks and layers, under the names of the real cases."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, dict] = {"roofs": {"FMA from registers": 100.0, "load + FMA, 16 KiB": 50.0}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "ROUNDS", 1)
        patch.setattr(kernels, "fma_peak", lambda: 100.0)
        # The published packages bring an OpenMP runtime of their own, which other tests must not find here.
        patch.setattr(kernels, "_sparseprop", _not_installed)
        patch.setattr(kernels, "_sparselab", _not_installed)
        patch.setitem(models.TITLES, "test_resnet", "tiny")
        patch.setitem(channels.MODELS, "test_resnet", lambda: timm.create_model("test_resnet", num_classes=10))
        linear, conv = kernels.Shape(32, 48, 20), kernels.Shape(8, 16, 6, 3, 2, batch=4)
        found["linear-90"] = kernels.measure([linear], 0.9, SETTINGS)
        found["conv-90"] = kernels.measure([conv, kernels.Shape(8, 8, 6, 1, batch=4)], 0.9, Settings(2, 1))
        found["train/tiny"] = training.measure(TINY, SETTINGS)
        fast = dict(found["train/tiny"])
        fast["step"] = {
            "variants": {"sparse": 10.0, "dense contiguous": 40.0, "dense channels_last": 30.0,
                         "dense bf16 channels_last": 8.0},
            "page_faults": {"sparse": 5, "dense contiguous": 7, "dense channels_last": 6},
            "dense_bf16_ms": 8.0, "speedup": 3.0,
        }  # fmt: skip
        found["train/fast"] = fast
        found["train/dense"] = {**fast, "native": 0, "step": None, "choice": {"dense_ms": 12.0, "sparse_ms": 13.0}}
        dense = {"weights": 100, "gradients": 100, "optimizer": 200, "state": 400, "indices": 0, "peak": 2**30}
        found["memory/tiny"] = {
            "title": "tiny", "optimizer": "adamw",
            "variants": {"sparse": {**dense, "state": 40, "peak": 2**29}, "dense contiguous": dense},
        }  # fmt: skip
        found["infer/tiny"] = {
            "title": "tiny", "native": 3, "layers": 4, "note": "",
            "ms": {"sparse": 2.0, "dense contiguous": 3.0, "dense channels_last": 4.0,
                   "dense bf16 channels_last": 5.0, "onnxruntime": 1.0},
        }  # fmt: skip
        patch.setattr(plain, "TURN_S", 0.0)
        found["plain/tiny"] = plain.measure("training", TINY, SETTINGS)
        found["plain/fast"] = {
            "title": "fast", "what": "forward",
            "ms": {"sparse": 10.0, "sparse, nothing kept": 25.0,
                   "dense contiguous": 40.0, "dense channels_last": 30.0},
        }  # fmt: skip
        found["swat/tiny"] = swat.measure(models.Workload("test_resnet", 0.9, 8, 32), SETTINGS)
        patch.setattr(channels, "KEEP", (0.5,))
        found["channels/tiny"] = channels.measure(channels.Network("tiny", "test_resnet", 2, 32), SETTINGS)
        found["channels/fast"] = {
            "title": "fast", "ms": {"dense contiguous": 50.0, "dense channels_last": 40.0, "one 0.5": 20.0},
            "operations": {"0.5": 0.25},
        }  # fmt: skip
        patch.setattr(depthwise, "ROUNDS", 1)
        found["depthwise"] = depthwise.measure([(4, 6, 1), (4, 7, 2)], 3, SETTINGS)
        found["pattern"] = kernels.measure_pattern(SETTINGS)
    return found


@pytest.fixture(scope="module")
def sections(figures):
    cases = {name: {"figures": case, "seconds": 1, "load_before": 0.0} for name, case in figures.items()}
    return page.sections(json.loads(json.dumps({"machine": machine(), "cases": cases})))


def test_layers(figures):
    (row,) = figures["linear-90"]["rows"]
    assert row["threads"] == 1 and set(row["gflops"]) == set(page.PRODUCTS)
    assert {"sparse_ft", "torch dense", "torch CSR"} <= set(row["rivals"])
    assert "step" not in row["rivals"]["torch CSR"] and row["rivals"]["torch dense"]["step"] > 0
    assert [(row["threads"], row["kernel"]) for row in figures["conv-90"]["rows"]] == [(1, 3), (1, 1), (2, 3), (2, 1)]
    assert torch.get_num_threads() == 1


def test_sub_networks(figures):
    tiny = figures["channels/tiny"]
    assert set(tiny["ms"]) == {"dense contiguous", "dense channels_last", "one 0.5", "both 0.5"}
    assert 0.1 < tiny["operations"]["0.5"] < 0.5


def test_each_gradient_is_computed_alone():
    dense, x = kernels.Shape(8, 6, 5).make(0.5)
    sparse = sparse_ft.nn.SparseLinear.from_dense(dense)
    found = {name: run() for name, run in kernels.products(sparse, x).items()}
    assert found["forward"].shape == (5, 6) and not found["forward"].requires_grad
    assert [g.shape for g in found["input gradient"]] == [x.shape]
    assert [g.shape for g in found["weight gradient"]] == [sparse.weight.shape]
    assert sparse.weight.grad is None and sparse.weight.requires_grad


def test_what_swat_keeps_and_computes(figures):
    row = figures["swat/tiny"]
    assert row["kept_mib"]["swat"] < row["kept_mib"]["dense"] and row["sparse_products"] <= row["products"]
    assert 0 < row["weights_mib"]["values"] < 0.13 * row["weights_mib"]["dense"]  # of these, some meet padding alone
    assert all(0.05 < share <= 1 for share in row["operations"].values())


def test_tables(sections):
    training_text = sections["training"]
    assert "| left dense | 1.00 |" in training_text and "| 40 / 30 | 8 | 10 | 3.00 | 0.80 | 6 / 5 |" in training_text
    assert "tiny, 95%, batch 2, 32² against dense bf16 (0.80)" in training_text
    assert "against onnxruntime (0.50)" in sections["inference"]
    assert "| 0.100 | 0.0 | 512 | 0.50 |" in sections["memory"]
    assert "| 50% of the channels, one | 0.250 | 20 | 2.00 | 3.00 | 0.67 |" in sections["channels"]
    assert "| forward, fast | 40 / 30 | 25 | 10 | 2.50 | 3.00 |" in sections["plain"]
    assert "| torch CSR |" in sections["linear"] and "weight gradient, GF/s (share of peak)" in sections["linear"]
    assert "1.00 / 1.00 / 1.00" in sections["convolutions"]
    assert "(10.0%)" in sections["swat"] and "tiny, 90%, batch 8, 32²" in sections["swat"]
    assert "| 4 channels, 7², stride 2 |" in sections["depthwise"] and "batch 3" in sections["depthwise"]
    assert "| FMA from registers | 100 | 1.00 |" in sections["roofs"]


def test_the_page_has_a_place_for_every_section(sections, tmp_path):
    published = ROOT / "docs" / "benchmarks.md"
    text = page.fill(published, sections)
    assert all(section in text for section in sections.values())
    copy = tmp_path / "page.md"
    copy.write_text(text)
    assert page.fill(copy, sections) == text
    with pytest.raises(ValueError, match="has marks for"):
        page.fill(copy, {"roofs": ""})


def test_inference_beside_onnxruntime():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    figures = inference.measure(TINY, SETTINGS)
    assert figures["ms"]["onnxruntime"] > 0 and {"sparse", "dense bf16 channels_last"} <= set(figures["ms"])


def test_texts():
    workload = models.Workload("bert-base", 0.97, 16, 128, "adamw")
    assert workload in training.WORKLOADS and workload.title == "BERT-base, 97%, 16 × 128 tokens"


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "keep_freed_memory", lambda: "left as it is")
    monkeypatch.setattr(page, "_roofs", lambda roofs: f"peak {roofs['peak']}")
    cases = {name: Case(name, lambda settings: {"peak": 3}) for name in ("roofs", "train/one", "train/two")}
    monkeypatch.setattr(bench, "all_cases", lambda: cases)
    results = tmp_path / "out" / "b.json"

    def run(*argv):
        try:
            bench.main([*argv, "--json", str(results), "--threads", "1"])
        except SystemExit as exit:
            return exit.code, capsys.readouterr().err
        return 0, capsys.readouterr().out

    assert run("--list") == (0, "roofs\ntrain/one\ntrain/two\n")
    assert run("--only", "train/*", "nothing")[1].endswith("the cases are roofs, train/one, train/two\n")
    status, message = run("--only", "roofs", "--page", "page.md")
    assert status == 2 and "a page needs every case, train/one, train/two would be missing" in message
    status, out = run("--only", "roofs", "--markdown", str(tmp_path / "b.md"))
    assert status == 0 and "peak 3" in out and out == (tmp_path / "b.md").read_text()
    assert list(json.loads(results.read_text())["cases"]) == ["roofs"]

    content = json.loads(results.read_text())
    content["cases"]["train/two"] = content["cases"].pop("roofs")
    del cases["train/one"], cases["train/two"]
    cases["train/two"] = Case("train/two", pytest.fail)
    monkeypatch.setattr(page, "_training", lambda rows: "training")
    results.write_text(json.dumps(content))
    status, out = run("--reuse")  # measures what is missing, and that alone
    assert status == 0 and "peak 3" in out and "training" in out
    assert list(json.loads(results.read_text())["cases"]) == ["roofs", "train/two"]
    content["machine"]["processor"] = "another"
    results.write_text(json.dumps(content))
    status, message = run("--reuse")
    assert status == 2 and "was measured elsewhere (processor 'another')" in message


def test_every_case_is_listed():
    assert list(bench.all_cases()) == [case.name for case in CASES]
