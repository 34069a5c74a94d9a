"""Instruction sets, threads and the OpenMP runtime of the process."""

import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from oracle import pattern_of, sparse_weight

from sparse_ft import ops


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_the_best_instruction_set_comes_first_and_portable_is_always_there():
    available = ops.available_isas()
    assert available == [name for name in ("avx512-jit", "avx512", "avx2", "portable") if name in available]
    assert available[-1] == "portable"


def test_environment_forces_an_instruction_set():
    code = "import sparse_ft.ops as o; print(o.active_isa())"
    assert _python(code, SPARSE_FT_ISA="portable").stdout.strip() == "portable"
    assert _python(code, SPARSE_FT_ISA="").stdout.strip() == ops.available_isas()[0]


def test_an_unknown_instruction_set_is_one_clear_error():
    result = _python("import sparse_ft.ops", SPARSE_FT_ISA="avx1024")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: ") and "'avx1024'" in last and "'portable'" in last
    with pytest.raises(ValueError, match="not available here"):
        ops.activate_isa("")


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the list of loaded libraries is Linux's")
@pytest.mark.parametrize(
    "imports",
    ["import sparse_ft", "import sparse_ft.ops, sklearn.linear_model", "import timm, transformers, sparse_ft"],
)
def test_one_openmp_runtime(imports):
    """The core must not bring a second one beside torch's: two thread pools would fight for the cores.

    scikit-learn ships a runtime of its own, so with it there may be that one more, and none of ours.
    """
    code = (
        f"{imports}\nimport torch, sparse_ft.nn as nn\n"
        "layer = nn.SparseLinear.from_dense(torch.nn.Linear(8, 8)); layer(torch.randn(4, 8)).sum().backward()\n"
        "print(open('/proc/self/maps').read())"
    )
    result = _python(code)
    assert result.returncode == 0, result.stderr
    libraries = {line.split()[-1] for line in result.stdout.splitlines() if re.search(r"lib(g|i)?omp\d*[-.]", line)}
    assert len([path for path in libraries if "scikit_learn" not in path]) == 1, libraries


def test_threads_follow_torch():
    """The forward product splits rows, never a sum: it is the same to the last bit on any number of threads."""
    weight = sparse_weight((64, 40, 3, 3), 0.2, torch.Generator().manual_seed(0))
    pattern, values = pattern_of(weight, (1, 1, 1, 1))
    x = torch.randn(20, 40, 9, 9)
    outputs = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        outputs.append(
            torch.ops.sparse_ft.conv2d(x, values, None, pattern.tensors, weight.shape, (1, 1), (1, 1, 1, 1), (1, 1), 1)
        )
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_calls_from_several_threads_at_once():
    """Each caller has scratch memory of its own; the GIL is released while a kernel runs."""
    weight = sparse_weight((50, 60), 0.2, torch.Generator().manual_seed(0))
    pattern, values = pattern_of(weight)
    inputs = [torch.randn(n, 60) for n in (3, 100, 257, 31)]
    results: dict[int, list[torch.Tensor]] = {}

    def work(i: int) -> None:
        results[i] = [torch.ops.sparse_ft.linear(inputs[i], values, None, pattern.tensors, 60, 50) for _ in range(30)]

    callers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for i, x in enumerate(inputs):
        want = torch.ops.sparse_ft.linear(x, values, None, pattern.tensors, 60, 50)
        assert all(torch.equal(got, want) for got in results[i])


def test_after_fork():
    """Workers of a DataLoader are forked after the parent has used its threads."""
    code = """
import os, torch
from sparse_ft.nn import SparseLinear
torch.set_num_threads(2)
layer = SparseLinear.from_dense(torch.nn.Linear(64, 64))
layer(torch.randn(512, 64))
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    layer(torch.randn(512, 64))
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert _python(code).stdout.strip() == "7"
