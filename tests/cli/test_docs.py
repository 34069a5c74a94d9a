"""docs/cli.md names every option, and docs/finetuning.md runs."""

import importlib
import re
from pathlib import Path

import pytest

from sparse_ft.cli import COMMANDS
from sparse_ft.cli.finetune import COMMON

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("command", COMMANDS)
def test_reference_names_every_option(command):
    section = (DOCS / "cli.md").read_text().split(f"\n## {command}\n")[1].split("\n## ")[0]
    named = set(re.findall(r"--[a-z][a-z0-9-]*", section))
    parser = importlib.import_module(f"sparse_ft.cli.{command}").make_parser("sparse-ft")
    own = {
        name
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--") and "_" not in name and action.help != "==SUPPRESS=="
        if command not in ("finetune", "train") or action.dest not in COMMON
    }
    if command == "train":  # which has the options of finetune
        own = {"--recipe"}
    assert own - {"--help"} <= named
    known = {name for action in parser._actions for name in action.option_strings}
    assert named <= known


def test_example_of_the_guide_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "finetuning.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        code = block.replace('report_to="none"', 'report_to="none", keep_freed_memory=False, sparse_policy="always"')
        exec(compile(code, "finetuning.md", "exec"), {})
    assert (tmp_path / "out" / "mine" / "model.safetensors").is_file()
