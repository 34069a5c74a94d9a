import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """More threads than free cores wait for one another; a test that wants some asks for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
