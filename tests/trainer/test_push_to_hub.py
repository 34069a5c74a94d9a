"""`push_to_hub=True` uploads what sparse training adds, during the run and at its end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "hub"))

from hub_server import WRITE_TOKEN, running_hub  # noqa: E402

TRAIN = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from tiny import make_trainer, pruned, {model}

trainer = make_trainer(
    pruned({model}()), sys.argv[2], push_to_hub=True, hub_model_id="user/sparse", save_strategy="epoch",
    eval_strategy="epoch", hub_strategy="checkpoint", hub_always_push=True, hub_token=os.environ["HF_TOKEN"],
    trainer_options={{"card": {{"license": "mit"}}}},
)
trainer.train()
trainer.push_to_hub(dataset_tags="digits", tags="tiny")
"""


@pytest.fixture
def hub():
    yield from running_hub()


@pytest.mark.parametrize("model", ["bert", "timm_resnet"])
def test_trainer_pushes_dense_weights_and_the_sparse_card(hub, tmp_path, model):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN.format(model=model), str(HERE), str(tmp_path / "out")],
        env=clean | hub.environment(tmp_path / "home") | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = hub.files("user/sparse")
    assert {"model.safetensors", "config.json", "sparse_ft.json", "README.md"} <= files.keys()
    assert {"last-checkpoint/sparse_masks.safetensors", "last-checkpoint/optimizer.pt"} <= files.keys()
    assert not any("_saving" in name or "training_args" in name for name in files)
    assert not list((tmp_path / "out").glob("_pushing-*"))
    secret = WRITE_TOKEN.encode()
    assert not any(secret in content for content in files.values()), "a token was published"
    kept = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in kept)
    assert not any(secret in path.read_bytes() for path in kept), "a token lies in the run's folder"
    assert WRITE_TOKEN not in done.stdout + done.stderr
    assert json.loads(files["sparse_ft.json"])["sparsity"]["sparsity"] > 0.5
    card = files["README.md"].decode()
    for entry in ("license: mit", "- sparse_ft", "- tiny", "datasets: digits", 'from_pretrained("user/sparse")'):
        assert entry in card
