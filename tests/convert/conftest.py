import pytest
import torch


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """One thread, a fixed seed, and timings of its own."""
    monkeypatch.setenv("SPARSE_FT_CACHE", str(tmp_path / "timings"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
