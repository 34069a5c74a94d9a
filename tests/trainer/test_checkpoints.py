"""Checkpoints: what is in them, how they are written, what becomes of them when writing fails."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny import Images, bert, make_trainer, pruned, resnet, timm_resnet
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, TrainerCallback

import sparse_ft
from sparse_ft.checkpoint import CheckpointError, complete_folder
from sparse_ft.hub import timm_models
from sparse_ft.live import native_layers
from sparse_ft.masks import mask_state
from sparse_ft.nn import SparseModule


def folders(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_best_model_is_loaded_and_the_limit_kept(tmp_path):
    arguments = {
        "num_train_epochs": 4,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "learning_rate": 0.2,  # so high that the last is not the best
    }
    trainer = make_trainer(pruned(bert()), tmp_path, **arguments)
    trainer.train()
    evaluations = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(evaluations, key=evaluations.get)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert f"checkpoint-{best}" in folders(tmp_path)
    assert len(folders(tmp_path)) <= 2
    saved = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluations[best], rel=1e-6)


def test_checkpoint_names_what_is_sparse(tmp_path):
    trainer = make_trainer(pruned(resnet()), tmp_path, save_strategy="epoch", sparse_ignore=["re:.*stages.1.*"])
    trainer.train()
    checkpoint = tmp_path / "checkpoint-8"
    info = json.loads((checkpoint / "sparse_ft.json").read_text())
    assert info["native_layers"] == trainer.conversion_report.converted
    assert all("stages.0" in name for name in info["native_layers"])
    assert info["sparsity"]["sparsity"] > 0.5
    weights = load_file(checkpoint / "model.safetensors")
    masks = sparse_ft.hub.bitmap.read_masks(checkpoint / "sparse_masks.safetensors")
    assert masks.keys() == mask_state(trainer.model).keys()
    for name, mask in masks.items():
        assert not weights[name][~mask].any()


@pytest.mark.parametrize("make_model", [resnet, bert])
def test_saved_model_loads_in_stock_transformers(tmp_path, make_model):
    trainer = make_trainer(pruned(make_model()), tmp_path)
    trainer.train()
    trainer.save_model()
    auto = AutoModelForSequenceClassification if make_model is bert else AutoModelForImageClassification
    stock = auto.from_pretrained(tmp_path).eval()
    assert not any(isinstance(module, sparse_ft.nn.SparseModule) for module in stock.modules())
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, trainer.model.eval()(**batch).logits, atol=1e-5, rtol=1e-4)


def test_plain_timm_model_loads_in_stock_timm_and_transformers(tmp_path):
    trainer = make_trainer(pruned(timm_resnet()), tmp_path, save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    images = torch.stack([Images()[i]["pixel_values"] for i in range(4)])
    expected = trainer.model.eval()(images)
    for folder in (tmp_path, tmp_path / "checkpoint-8"):
        stock = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        torch.testing.assert_close(stock(images), expected, atol=1e-5, rtol=1e-4)
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(wrapped(images).logits, expected, atol=1e-5, rtol=1e-4)


def test_wrapped_timm_model_resumes_from_timm_names(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 3, "optim": "sgd"}
    whole = make_trainer(timm_models.wrap(pruned(timm_resnet())), tmp_path, **arguments)
    whole.train()
    assert "timm_model.conv1.weight" not in load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    resumed = make_trainer(timm_models.wrap(timm_resnet(seed=1)), tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_module_of_neither_library_trains_and_resumes(tmp_path):
    def make_model(seed=0):
        torch.manual_seed(seed)
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(768, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)
        )

    arguments = {"save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(pruned(make_model()), tmp_path, **arguments)
    whole.train()
    assert whole.evaluate()["eval_loss"] < 1.0
    assert whole.predict(Images()).predictions.shape == (24, 4)
    resumed = make_trainer(make_model(seed=1), tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(resumed.model.state_dict()["1.weight"], whole.model.state_dict()["1.weight"])


def test_unlabelled_images_are_predicted(tmp_path):
    class Unlabelled(Images):
        def __getitem__(self, i):
            return {"pixel_values": self.images[i]}

    trainer = make_trainer(pruned(timm_resnet()), tmp_path)
    assert trainer.predict(Unlabelled(7)).predictions.shape == (7, 4)


def test_failed_write_leaves_earlier_checkpoints_alone(tmp_path, monkeypatch):
    trainer = make_trainer(pruned(resnet()), tmp_path, save_strategy="epoch", save_total_limit=1)

    def full(folder):
        if "checkpoint-8" in folder:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer, "_save_rng_state", full)
    with pytest.raises(
        CheckpointError, match="checkpoint-8' could not be written: no space left on the disk"
    ) as caught:
        trainer.train()
    assert "earlier checkpoints are untouched" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert folders(tmp_path) == ["checkpoint-4"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(small_disk):
    trainer = make_trainer(pruned(resnet()), small_disk, save_strategy="epoch")
    filling = small_disk / "filling"

    class Fill(TrainerCallback):
        """Leaves room for a part of the second checkpoint."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
                filling.write_bytes(b"0" * (free - 40_000))

    trainer.add_callback(Fill())
    with pytest.raises(CheckpointError, match="checkpoint-8' could not be written: no space left on the disk"):
        trainer.train()
    assert folders(small_disk) == ["checkpoint-4", "filling"]
    filling.unlink()
    make_trainer(resnet(), small_disk, save_strategy="epoch").train(resume_from_checkpoint=True)
    assert folders(small_disk) == ["checkpoint-4", "checkpoint-8"]


def test_folder_is_complete_or_absent(tmp_path):
    target = tmp_path / "checkpoint-1"
    with pytest.raises(KeyboardInterrupt), complete_folder(target) as folder:
        (folder / "half").write_text("x")
        assert not target.exists()
        raise KeyboardInterrupt
    assert folders(tmp_path) == []
    for content in ("first", "second"):
        with complete_folder(target) as folder:
            (folder / content).write_text("x")
    assert folders(tmp_path) == ["checkpoint-1"]
    assert folders(target) == ["second"]


def test_lost_mask_is_reported(tmp_path):
    class Regrow(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.get_parameter(name).fill_(1.0)

    model = pruned(resnet())
    name = list(mask_state(model))[1]
    trainer = make_trainer(model, tmp_path, sparse_policy="none", trainer_options={"callbacks": [Regrow()]})
    with pytest.raises(RuntimeError, match=f"the mask of {name} was not kept"):
        trainer.train()


def test_dense_model_trains_and_says_that_nothing_is_pruned(tmp_path, capsys):
    trainer = make_trainer(resnet(), tmp_path, log_level="warning")
    trainer.train()
    assert "the model has no zeros to keep" in capsys.readouterr().err


def test_announcements(tmp_path, capsys):
    make_trainer(pruned(resnet()), tmp_path, log_level="warning", keep_freed_memory=True).train()
    errors = capsys.readouterr().err
    assert "sparse_ft: 7 of 7 pruned layers run on the native sparse kernels" in errors
    assert "freed memory" in errors


@pytest.mark.parametrize("policy", ["auto", "always"])
@pytest.mark.parametrize("make_model", [bert, resnet])
def test_mixed_precision(make_model, policy, tmp_path):
    """Layers are measured and run natively in bfloat16; what is trained and saved is float32."""
    model = pruned(make_model())
    masks = mask_state(model)
    trainer = make_trainer(model, tmp_path, log_level="warning", sparse_policy=policy, bf16=True)
    seen = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, y: seen.add(y.dtype) if isinstance(module, SparseModule) else None
    )
    trainer.train()
    hook.remove()
    assert trainer.conversion_report is not None
    if policy == "always":
        assert len(native_layers(trainer.model)) == len(masks) and seen == {torch.bfloat16}
    state = sparse_ft.to_dense(trainer.model).state_dict()
    assert all(t.dtype == torch.float32 for t in state.values() if t.is_floating_point())
    assert all(not state[name][~mask].any() for name, mask in masks.items())


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"min_sparsity must be in \[0, 1\), not 1.0"):
        sparse_ft.SparseTrainingArguments(output_dir=str(tmp_path), min_sparsity=1.0)
    with pytest.raises(ValueError, match="sparse_policy must be auto, always or none, not 'fast'"):
        sparse_ft.SparseTrainingArguments(output_dir=str(tmp_path), sparse_policy="fast")
    with pytest.raises(ValueError, match="'re:nothing' matches no prunable layer"):
        make_trainer(pruned(resnet()), tmp_path, sparse_ignore=["re:nothing"]).train()
    with pytest.raises(TypeError, match="args must be SparseTrainingArguments"):
        sparse_ft.SparseTrainer(resnet(), args=object())
