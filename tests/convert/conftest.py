import pytest
import torch

from sparse_ft.nn import norm


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A fixed seed, and timings of its own."""
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "timings"))
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def small_norms_wait(monkeypatch):
    """As large ones do: tests are small."""
    monkeypatch.setattr(norm, "FEWEST_TO_WAIT", 0)
