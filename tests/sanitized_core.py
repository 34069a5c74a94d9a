"""pytest plugin of `make test-sanitize`: the native core from build/sanitize in place of the installed one.

Processes that a test starts have the installed core.
"""

import importlib.util
import sys
from pathlib import Path

import torch  # noqa: F401  before the native core, as in sparse_ft.ops.native

NAME = "sparse_ft.ops._native"
BUILD = Path(__file__).parents[1] / "build" / "sanitize"


def _load() -> None:
    found = sorted(BUILD.glob("_native*.so"))
    if len(found) != 1:
        raise FileNotFoundError(f"{BUILD} holds {len(found)} native cores instead of one: run `make test-sanitize`")
    spec = importlib.util.spec_from_file_location(NAME, found[0])
    assert spec is not None and spec.loader is not None
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def pytest_report_header() -> str:
    return f"native core: {sys.modules[NAME].__file__}"


_load()
