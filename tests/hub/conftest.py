import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, running_hub

import sparse_ft

PACKAGE_PARENT = str(Path(sparse_ft.__file__).parents[1])  # the clients are to use the package under test


@pytest.fixture
def hub() -> Iterator[HubServer]:
    yield from running_hub()


@pytest.fixture
def run_client(hub: HubServer, tmp_path: Path) -> Callable[..., str]:
    """Run Python code in a process of its own, because HF_ENDPOINT is read when huggingface_hub is imported.

    Returns what the code printed. `environment` adds variables; `token=None` runs it without a token; each `home`
    has its own download cache.
    """

    def run(
        code: str, *, token: str | None = "write", home: str = "home", timeout: float = 120, **environment: str
    ) -> str:
        tokens = {} if token == "write" else {"token": token}
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        clean |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": PACKAGE_PARENT}
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=clean | hub.environment(tmp_path / home, **tokens) | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run
