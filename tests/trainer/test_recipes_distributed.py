"""A recipe in two processes: equal masks, and the result of one process with twice the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import bert, make_trainer

HERE = Path(__file__).parent

RECIPE = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 4}
  - !MODIFIER
"""
METHODS = {
    "gmp": "GMPruningModifier {params: ['re:.*layer.*dense.weight'], init_sparsity: 0.2, final_sparsity: 0.8,"
    " start_epoch: 0, end_epoch: 3, update_frequency: 0.5}",
    "rigl": "RigLPruningModifier {params: ['re:.*layer.*dense.weight'], final_sparsity: 0.8, start_epoch: 0,"
    " end_epoch: 3, update_frequency: 1}",
}

WORKER = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from tiny import bert, make_trainer

arguments = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 3, "ddp_backend": "gloo",
             "use_cpu": True, "adam_epsilon": 1e-3, "save_strategy": "steps", "save_steps": 6, "recipe": sys.argv[3],
             "num_train_epochs": 4}
trainer = make_trainer(bert(dropout=0.0), sys.argv[2], **arguments)
trainer.train()
state = {"weights": trainer.model.state_dict(), "masks": trainer.masks}
torch.save(state, os.path.join(sys.argv[2], f"rank{os.environ['RANK']}.pt"))
resumed = make_trainer(bert(seed=1, dropout=0.0), sys.argv[2], **arguments)
resumed.train(resume_from_checkpoint=sys.argv[2] + "/checkpoint-6")
for name, tensor in resumed.model.state_dict().items():
    assert torch.equal(tensor, state["weights"][name]), name
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes(tmp_path, method):
    recipe = RECIPE.replace("MODIFIER", METHODS[method])
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(worker)]
        + [str(HERE), str(tmp_path), recipe],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert ranks[0]["masks"]
    for part in ("weights", "masks"):
        for name, tensor in ranks[0][part].items():
            assert torch.equal(tensor, ranks[1][part][name]), name
    alone = make_trainer(
        bert(dropout=0.0), tmp_path / "alone", train_sampling_strategy="sequential", sparse_policy="none",
        adam_epsilon=1e-3, recipe=recipe, num_train_epochs=4,
    )  # fmt: skip
    alone.train()
    for name, mask in alone.masks.items():
        assert torch.equal(mask, ranks[0]["masks"][name]), name
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(ranks[0]["weights"][name], tensor, atol=1e-4, rtol=1e-3)
