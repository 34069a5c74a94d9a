import pytest
import torch

from sparse_ft.nn import deferred


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A fixed seed, and timings of its own."""
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "timings"))
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def small_activations_wait(monkeypatch):
    """As large ones do: tests are small."""
    monkeypatch.setattr(deferred, "FEWEST_VALUES", 0)
