import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """More threads than free cores wait for one another; a test that wants some asks for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def control_c():
    """A process that a shell starts in the background ignores it, and so would all that tests start and interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
