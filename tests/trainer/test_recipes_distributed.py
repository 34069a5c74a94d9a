"""A recipe in two processes: equal masks at every step, and the result of one process with twice the batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import bert, make_trainer

HERE = Path(__file__).parent
EPOCHS, STEPS = 8, 4

RECIPE = """
modifiers:
  - !EpochRangeModifier {start_epoch: 0, end_epoch: 8}
  - !MODIFIER
"""
# Masks stand still for twelve steps, for which layers become native, and are dense again for the next update.
METHODS = {
    "gmp": "GMPruningModifier {params: ['re:.*layer.*dense.weight'], init_sparsity: 0.6, final_sparsity: 0.8,"
    " start_epoch: 0, end_epoch: 6, update_frequency: 3}",
    "rigl": "RigLPruningModifier {params: ['re:.*layer.*dense.weight'], final_sparsity: 0.8, start_epoch: 0,"
    " end_epoch: 7, update_frequency: 3}",
    "acdc": "ACDCPruningModifier {params: ['re:.*layer.*dense.weight'], compression_sparsity: 0.8, start_epoch: 0,"
    " end_epoch: 6, update_frequency: 3}",
}
COMMON = {
    "train_sampling_strategy": "sequential", "adam_epsilon": 1e-3, "num_train_epochs": EPOCHS, "ddp_backend": "gloo",
    "use_cpu": True,
}  # fmt: skip

WORKER = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from tiny import bert, make_trainer
from transformers import TrainerCallback
from test_recipes_distributed import COMMON
from sparse_ft.live import native_layers

class Watch(TrainerCallback):
    def __init__(self):
        self.steps, self.sent = [], 0
    def on_step_end(self, args, state, control, **kwargs):
        sent, self.sent = trainer._replicas.sent - self.sent, trainer._replicas.sent
        self.steps.append({"masks": {n: m.clone() for n, m in trainer.session.masks.items()}, "sent": sent,
                           "native": native_layers(trainer.model)})

arguments = COMMON | {"per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 10,
                      "recipe": sys.argv[3], "sparse_policy": sys.argv[4]}
watch = Watch()
trainer = make_trainer(bert(dropout=0.0), sys.argv[2], trainer_options={"callbacks": [watch]}, **arguments)
trainer.train()
state = {"weights": trainer.model.state_dict(), "steps": watch.steps, "masks": trainer.masks,
         "dense": 4 * sum(p.numel() for p in bert().parameters())}
torch.save(state, os.path.join(sys.argv[2], f"rank{os.environ['RANK']}.pt"))
resumed = make_trainer(bert(seed=1, dropout=0.0), sys.argv[2], **arguments)
resumed.train(resume_from_checkpoint=sys.argv[2] + "/checkpoint-10")
for name, tensor in resumed.model.state_dict().items():
    assert torch.equal(tensor, state["weights"][name]), name
"""


def two_processes(folder, recipe, policy):
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(worker)]
        + [str(HERE), str(folder), recipe, policy],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["always", "none"])
@pytest.mark.parametrize("method", METHODS)
def test_two_processes(tmp_path, method, policy):
    recipe = RECIPE.replace("MODIFIER", METHODS[method])
    ranks = two_processes(tmp_path, recipe, policy)
    assert len(ranks[0]["steps"]) == EPOCHS * STEPS
    for ours, theirs in zip(ranks[0]["steps"], ranks[1]["steps"], strict=True):
        assert ours["masks"].keys() == theirs["masks"].keys()
        assert all(torch.equal(mask, theirs["masks"][name]) for name, mask in ours["masks"].items())
        assert ours["native"] == theirs["native"]
    for name, tensor in ranks[0]["weights"].items():
        assert torch.equal(tensor, ranks[1]["weights"][name]), name

    forms = [bool(step["native"]) for step in ranks[0]["steps"]]
    if policy == "always":
        assert forms[-1]
        assert sum(a != b for a, b in zip(forms, forms[1:], strict=False)) > 2
    else:
        assert not any(forms)
    # All that is sent of a weight under a mask is what the mask keeps, whichever form its layer has.
    pruned = 4 * sum(int((~mask).sum()) for mask in ranks[0]["masks"].values())
    assert ranks[0]["steps"][-1]["sent"] == ranks[0]["dense"] - pruned

    alone = make_trainer(
        bert(dropout=0.0), tmp_path / "alone", sparse_policy="none", recipe=recipe, **COMMON | {"ddp_backend": None}
    )
    alone.train()
    for name, mask in alone.masks.items():
        assert torch.equal(mask, ranks[0]["masks"][name]), name
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(ranks[0]["weights"][name], tensor, atol=1e-4, rtol=1e-3)
