"""Two processes that average their gradients train as one with twice the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import bert, make_trainer, pruned

from sparse_ft.masks import mask_state

HERE = Path(__file__).parent

WORKER = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from tiny import bert, make_trainer, pruned

arguments = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 3, "ddp_backend": "gloo",
             "use_cpu": True, "adam_epsilon": 1e-3, "save_strategy": "steps", "save_steps": 4,
             "sparse_policy": sys.argv[3]}
trainer = make_trainer(pruned(bert(dropout=0.0)), sys.argv[2], **arguments)
trainer.train()
state = {"weights": trainer.model.state_dict(), "native": trainer.conversion_report and
         trainer.conversion_report.converted, "frozen": trainer._frozen.masks,
         "moments": {name: trainer.optimizer.state[trainer.model.get_parameter(name)]["exp_avg"]
                     for name in trainer._frozen.masks}}
torch.save(state, os.path.join(sys.argv[2], f"rank{os.environ['RANK']}.pt"))
resumed = make_trainer(bert(seed=1, dropout=0.0), sys.argv[2], **arguments)
resumed.train(resume_from_checkpoint=sys.argv[2] + "/checkpoint-4")
for name, tensor in resumed.model.state_dict().items():
    assert torch.equal(tensor, state["weights"][name]), name
"""


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["always", "none"])
def test_two_processes(tmp_path, policy):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(worker)]
        + [str(HERE), str(tmp_path), policy],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    alone = make_trainer(
        pruned(bert(dropout=0.0)), tmp_path / "alone", train_sampling_strategy="sequential", sparse_policy=policy,
        adam_epsilon=1e-3,
    )  # fmt: skip
    alone.train()
    for name, tensor in alone.model.state_dict().items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        torch.testing.assert_close(ranks[0]["weights"][name], tensor, atol=1e-4, rtol=1e-3)
    assert ranks[0]["native"] == ranks[1]["native"]
    for name, mask in mask_state(pruned(bert())).items():
        assert not ranks[0]["weights"][name][~mask].any(), name
    for name, moment in ranks[0]["moments"].items():
        assert not moment[~ranks[0]["frozen"][name]].any(), name
