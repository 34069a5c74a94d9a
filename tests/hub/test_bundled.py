import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny_models import images, tiny_resnet

import sparse_ft
from sparse_ft.hub import BUNDLED_MODELS, from_pretrained, load_model
from sparse_ft.masks import sparsity

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def pack_bundled():
    spec = importlib.util.spec_from_file_location("pack_bundled", SCRIPTS / "pack_bundled.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_packed_folder_is_the_model(pack_bundled, tmp_path, capsys):
    model = tiny_resnet()
    sparse_ft.save_pretrained(model, tmp_path / "trained", label_names=list("abcdefghij"))
    (tmp_path / "trained" / "train_results.json").write_text('{"sparse_accuracy": 0.5}')
    pack_bundled.pack(tmp_path / "trained", tmp_path / "packed")
    files = sorted(path.relative_to(tmp_path / "packed").as_posix() for path in (tmp_path / "packed").rglob("*.*"))
    assert files == ["config.json", "sparse/model.safetensors", "sparse_ft.json"]
    assert "90.0" in capsys.readouterr().out
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "packed").eval()(images()), model(images()))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["label_names"] == list("abcdefghij") and "tag" not in config["pretrained_cfg"]
    assert json.loads((tmp_path / "packed" / "sparse_ft.json").read_text())["training"] == {"sparse_accuracy": 0.5}


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_bundled_model_is_sparse_and_loads(name):
    folder = BUNDLED_MODELS[name]
    assert (folder / "README.md").is_file()
    model = from_pretrained(name, policy="always").eval()
    report = sparsity(model)
    assert report.overall_pruned > 0.9
    size = model.pretrained_cfg["input_size"]
    with torch.no_grad():
        output = model(torch.randn(2, *size))
    assert output.shape == (2, model.num_classes) == (2, len(model.pretrained_cfg["label_names"]))
    assert output.isfinite().all()
    wrapped = from_pretrained(name, num_labels=3, policy="always", for_trainer=True)
    assert wrapped(pixel_values=torch.randn(1, *size)).logits.shape == (1, 3)
