"""Ctrl-C and a full disk, as a user at a terminal meets them."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(run, image_model, tmp_path):
    out_dir = tmp_path / "out"
    arguments = [
        "finetune", "--model", str(image_model), "--dataset", "digits", "--output-dir", str(out_dir), "--max-steps",
        "100000", "--save-strategy", "no", "--eval-strategy", "no", "--logging-steps", "1", "--sparse-policy",
        "always", "--batch-size", "4", "--max-train-samples", "64", "--overwrite",
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "sparse_ft", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "'loss'" in line:  # training is under way
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "stopping: the current step is finished" in err
    found = re.search(r"interrupted after step (\d+); (\S+) is complete; go on with\n  (.*)$", err, re.MULTILINE)
    assert found, err
    step, checkpoint, command = int(found[1]), Path(found[2]), shlex.split(found[3])
    assert checkpoint == out_dir / f"checkpoint-{step}"
    assert (checkpoint / "trainer_state.json").is_file()
    assert command == ["python", "-m", "sparse_ft", *arguments[:-1], "--resume"]

    status, out, err = run(*command[3:], "--max-steps", step + 2, "--no-compare", "--no-keep-memory")
    assert status == 0, err
    assert f"{step + 2} steps" in out
    assert "'loss'" in out and f"after step {step}" not in err


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for the weights of the tiny model, not for a whole checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_one_line(run, image_model, small_disk):
    status, _, err = run(
        "finetune", "--model", image_model, "--dataset", "digits", "--output-dir", small_disk / "out",
        "--max-train-samples", 64, "--sparse-policy", "none", "--no-keep-memory", "--disable-tqdm", "true",
    )  # fmt: skip
    assert status == 1
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert "could not be written: no space left on the disk" in lines[0]
    assert "Traceback" not in err
    assert list((small_disk / "out").glob("*checkpoint*")) == []
