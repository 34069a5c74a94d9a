import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("SPARSE_FT_SHARED", Path(__file__).parents[3] / "shared"))


@pytest.fixture(scope="session")
def compat_folder():
    folder = SHARED / "compat"
    if not folder.is_dir():
        pytest.skip(f"no recorded behaviour at {folder}: set SPARSE_FT_SHARED")
    return folder
