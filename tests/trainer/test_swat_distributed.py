"""SWAT in two processes: the same weights in use and the same thresholds in both, at every step, and exact resume."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

WORKER = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from tiny import make_trainer, resnet
from transformers import TrainerCallback
from test_resume import SGD
from test_swat_training import RECIPE
from sparse_ft.methods.swat.layers import swat_layers

class Watch(TrainerCallback):
    steps = []
    def on_step_end(self, args, state, control, **kwargs):
        layers = swat_layers(trainer.model)
        self.steps.append({name: (layer.swat.active.mask(layer.weight).clone(), layer.swat.active.threshold)
                           for name, layer in layers.items()})
    def on_step_begin(self, args, state, control, **kwargs):
        self.inputs.append({name: layer.swat.threshold for name, layer in swat_layers(trainer.model).items()})
    inputs = []

arguments = SGD | {"recipe": RECIPE, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 3,
                   "ddp_backend": "gloo", "use_cpu": True, "per_device_train_batch_size": 2}
trainer = make_trainer(resnet(), sys.argv[2], trainer_options={"callbacks": [Watch()]}, **arguments)
trainer.train()
weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
torch.save({"weights": weights, "steps": Watch.steps, "inputs": Watch.inputs, "masks": trainer.masks},
           os.path.join(sys.argv[2], f"rank{os.environ['RANK']}.pt"))
resumed = make_trainer(resnet(seed=1), sys.argv[2], **arguments)
resumed.train(resume_from_checkpoint=sys.argv[2] + "/checkpoint-3")
for name, tensor in resumed.model.state_dict().items():
    assert torch.equal(tensor, weights[name]), name
"""


@pytest.mark.slow
@pytest.mark.slow
def test_two_processes(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(worker)]
        + [str(HERE), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert any(first["steps"]) and first["masks"]
    for ours, theirs in zip(first["steps"], second["steps"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, (mask, threshold) in ours.items():
            assert torch.equal(mask, theirs[name][0]) and threshold == theirs[name][1]
    assert first["inputs"] == second["inputs"] and any(
        None not in found.values() for found in first["inputs"] if found
    )
    for name, tensor in first["weights"].items():
        # Each process has its own running statistics between two forward passes.
        assert "running" in name or torch.equal(tensor, second["weights"][name]), name
