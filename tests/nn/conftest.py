import pytest
import torch

from sparse_ft.nn import deferred


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def small_activations_wait(monkeypatch):
    """As large ones do: tests are small."""
    monkeypatch.setattr(deferred, "FEWEST_VALUES", 0)
