import pytest
import torch


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A fixed seed, and timings of its own."""
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "timings"))
    torch.manual_seed(0)
