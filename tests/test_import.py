"""`import sparse_ft` is light, and everything is there when it is asked for."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import sparse_ft

LIGHT = "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, sorted(sys.modules)"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_alone_does_not_import_torch():
    run(f"import sys, sparse_ft; dir(sparse_ft), sparse_ft.__version__; {LIGHT}")


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["bench", "--help"], ["prune", "--wrong"]])
def test_help_of_the_command_line_does_not_import_torch(argv):
    run(f"import sys; from sparse_ft.cli import main; main({argv}); {LIGHT}")


def test_recipes_do_without_the_compiler():
    """torch.compile's machinery takes as long to import as torch."""
    run("import sys, sparse_ft.recipes; assert 'torch._dynamo' not in sys.modules")


@pytest.mark.parametrize(
    "imports",
    [
        "import sparse_ft, torch; sparse_ft.convert",
        "import sparse_ft, torch; from sparse_ft import prune",
        "import sparse_ft, torch, sparse_ft.ops",
        "import torch, sparse_ft",
    ],
)
def test_operators_are_registered(imports):
    assert run(f"{imports}; print(torch.ops.sparse_ft.linear)").strip() == "sparse_ft.linear"


def test_every_public_name_is_there():
    for name in sparse_ft.__all__:
        assert getattr(sparse_ft, name) is getattr(sparse_ft, name)
    assert set(sparse_ft.__all__) <= set(dir(sparse_ft))
    assert callable(sparse_ft.convert) and callable(sparse_ft.to_dense)
    with pytest.raises(AttributeError, match="module 'sparse_ft' has no attribute 'konvert'"):
        sparse_ft.konvert  # noqa: B018


def test_a_pickled_layer_brings_the_package_with_it(tmp_path):
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[:, ::2] = 0.0
    model = nn.Sequential(layer)
    sparse_ft.convert(model, policy="always")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    out = run(
        "import pickle, sys, torch\n"
        f"model = pickle.load(open({str(tmp_path / 'model.pickle')!r}, 'rb'))\n"
        "print(type(model[0]).__name__, *model(torch.ones(1, 6)).shape)"
    )
    assert out.split() == ["SparseLinear", "1", "4"]
