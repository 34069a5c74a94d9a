"""Side computations that leave the random stream of a run as it was."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Puts back the state of Python's, NumPy's and torch's CPU generators at the end.

    What runs inside (timing a layer, evaluating) then has no influence on the dropout and shuffling that follow, and
    a resumed run draws what the uninterrupted one draws.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
