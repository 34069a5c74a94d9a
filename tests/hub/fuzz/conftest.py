"""Limits under which a fuzzed case runs: a case that hangs, eats memory or ends the process is a failure."""

import resource
import signal
from collections.abc import Callable, Iterator

import pytest
import torch

SECONDS = 30  # of one case, on a machine with other work; cases take milliseconds
GROWTH = 768 * 2**20  # bytes of resident memory that a run of cases may add; the budget of a model's spare is a third


@pytest.fixture
def guarded() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Calls a case, with an alarm for hangs; at the end looks how far resident memory has grown."""
    torch.set_num_threads(1)

    def ring(signum: int, frame: object) -> None:
        raise TimeoutError(f"the case took more than {SECONDS} seconds")

    def run(case: Callable[[], None]) -> None:
        signal.alarm(SECONDS)
        try:
            case()
        finally:
            signal.alarm(0)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    old = signal.signal(signal.SIGALRM, ring)
    try:
        yield run
    finally:
        signal.signal(signal.SIGALRM, old)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert after - before < GROWTH, f"resident memory grew by {(after - before) >> 20} MiB"
