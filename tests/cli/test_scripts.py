"""The example scripts accept what users of the Hugging Face examples type."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from dataset_files import write_images

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch):
    def call(name, *argv):
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        runpy.run_path(str(SCRIPTS / name), run_name="__main__")

    return call


def test_image_classification(script, image_model, tmp_path):
    write_images(tmp_path / "train", count=6)
    write_images(tmp_path / "validation", count=2)
    script(
        "run_image_classification.py", "--model_name_or_path", image_model, "--train_dir", tmp_path / "train",
        "--validation_dir", tmp_path / "validation", "--do_train", "--do_eval", "--num_train_epochs", 1,
        "--per_device_train_batch_size", 4, "--output_dir", tmp_path / "out", "--sparse_policy", "always",
        "--no_keep_freed_memory", "--report_to", "none",
    )  # fmt: skip
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["eval_accuracy"] >= 0 and results["train_loss"] > 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "trainer_state.json").is_file()


def test_text_classification_from_a_json_file(script, text_model, reviews, tmp_path):
    settings = {
        "model_name_or_path": str(text_model),
        "train_file": str(reviews),
        "validation_file": str(reviews),
        "text_column_names": "text",
        "max_seq_length": 8,
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.02,
        "output_dir": str(tmp_path / "out"),
        "sparse_policy": "always",
        "keep_freed_memory": False,
        "report_to": "none",
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    script("run_text_classification.py", tmp_path / "settings.json")
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_accuracy"] == 1.0
    predictions = (tmp_path / "out" / "predict_results.txt").read_text().splitlines()
    assert predictions[0] == "index\tprediction"
    assert predictions[1:3] == ["0\tyes", "1\tno"]


def test_one_source_of_data_is_asked_for(script, image_model, tmp_path):
    with pytest.raises(ValueError, match="give either dataset_name or train_dir"):
        script("run_image_classification.py", "--model_name_or_path", image_model, "--output_dir", tmp_path)
