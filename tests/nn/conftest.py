import pytest
import torch

from sparse_ft.nn import norm


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def small_norms_wait(monkeypatch):
    """As large ones do: tests are small."""
    monkeypatch.setattr(norm, "FEWEST_TO_WAIT", 0)
