"""A run with a recipe that is killed at any moment goes on from its last checkpoint, to the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# The launcher imports everything once and forks a trainer for each attempt; it computes nothing itself, so that no
# thread is lost in a fork.
LAUNCHER = """
import json, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from transformers import TrainerCallback
from tiny import bert, make_trainer
from sparse_ft.checkpoint import check_checkpoint, last_checkpoint

out, kills, save_steps = Path(sys.argv[2]), int(sys.argv[3]), 3
EPOCHS = 2 * kills + 4  # of four steps
RECIPE = f'''
modifiers:
  - !EpochRangeModifier {{start_epoch: 0, end_epoch: {EPOCHS}}}
  - !GMPruningModifier {{params: ['re:.*layer.*dense.weight'], init_sparsity: 0.6, final_sparsity: 0.8, start_epoch: 0,
      end_epoch: {EPOCHS - 2}, update_frequency: 3}}
'''
STEPS = 4 * EPOCHS

class Progress(TrainerCallback):
    def __init__(self, file):
        self.file = file
    def on_step_end(self, args, state, control, **kwargs):
        self.file.write(f"{state.global_step}\\n")
        self.file.flush()

def train(folder):
    with open(out / f"{folder}.steps", "a") as file:
        trainer = make_trainer(bert(), out / folder, recipe=RECIPE, num_train_epochs=EPOCHS, save_strategy="steps",
                               save_steps=save_steps, save_total_limit=2,
                               trainer_options={"callbacks": [Progress(file)]})
        trainer.train(resume_from_checkpoint=last_checkpoint(out / folder) is not None)
        trainer.save_model()

def start(folder):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(folder)
            code = 0
        finally:
            os._exit(code)
    return child

def steps(folder):
    path = out / f"{folder}.steps"
    return [int(line) for line in path.read_text().split()] if path.exists() else []

chance, done, longest = random.Random(0), 0, 0
while done < kills:
    before, child = len(steps("killed")), start("killed")
    wanted = before + chance.randint(1, 7)
    while len(steps("killed")) < wanted and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "the run was over before it could be killed"
    done += 1
    reached = steps("killed")[-1]
    last = last_checkpoint(out / "killed")
    kept = int(last.rpartition("-")[2]) if last else 0
    assert reached - kept <= save_steps, (reached, kept)
    longest = max(longest, reached - kept)
    for folder in (out / "killed").glob("checkpoint-*"):  # every one, not only the last
        check_checkpoint(folder)
        for path in folder.glob("*.safetensors"):
            load_file(path)
        for path in folder.glob("*.json"):
            json.loads(path.read_text())
        torch.load(folder / "optimizer.pt", weights_only=True)
for folder in ("killed", "whole"):
    assert os.waitpid(start(folder), 0)[1] == 0
ours, theirs = (load_file(out / folder / "model.safetensors") for folder in ("killed", "whole"))
assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
assert not [path.name for path in (out / "killed").iterdir() if path.name.startswith("_")], "leftovers"
print(f"{done} kills, at most {longest} steps lost, {len(steps('killed'))} steps for {STEPS}")
"""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    launcher = tmp_path / "launcher.py"
    launcher.write_text(LAUNCHER)
    done = subprocess.run(
        [sys.executable, str(launcher), str(HERE), str(tmp_path), str(kills)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills, at most " in done.stdout
