"""How many weights each layer keeps. Exact counts: the sum over the layers is the target to one weight."""

import heapq
import math
from collections.abc import Sequence

SCOPES = ("uniform", "erk", "global")


def check_sparsity(value: object, where: str = "sparsity") -> float:
    """The value as a float.

    Raises:
        ValueError: It is not a number in [0, 1).
    """
    # NaN fails the comparison too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ValueError(f"{where} must be a number from 0 up to but not including 1, not {value!r}")
    return float(value)


def uniform(numel: int, sparsity: float) -> int:
    """Zeros of a layer of `numel` weights when every layer gets the same sparsity: round(numel * sparsity)."""
    return round(numel * sparsity)


def erk(shapes: Sequence[Sequence[int]], sparsity: float) -> list[int]:
    """Zeros per layer under the Erdős-Rényi-Kernel rule (Evci et al. 2020, arXiv 1911.11134).

    A layer's density is proportional to sum(shape) / prod(shape), capped at 1; what a capped layer does not take
    goes to the others. The zeros sum to round(total * sparsity), and no layer gets weights back when the sparsity
    rises: the nonzeros are apportioned by Webster's divisor method, which unlike largest remainders is monotone.
    """
    numels = [math.prod(shape) for shape in shapes]
    shares = [float(sum(shape)) for shape in shapes]
    total = sum(numels)
    return [
        n - kept for n, kept in zip(numels, _apportion(numels, shares, total - round(total * sparsity)), strict=True)
    ]


def _apportion(limits: Sequence[int], shares: Sequence[float], budget: int) -> list[int]:
    """Integers near `scale * share`, at most `limit`, that sum to `budget`.

    Layer i's k-th unit has the price (k - 1/2) / share_i, and the `budget` cheapest units are taken, ties in layer
    order. The real-valued solution is within one unit per layer of that, so a few exchanges finish it.
    """
    scale = _scale(limits, shares, budget)
    taken = [min(limit, math.floor(scale * share + 0.5)) for limit, share in zip(limits, shares, strict=True)]

    next_units = [((taken[i] + 0.5) / shares[i], i) for i in range(len(limits)) if taken[i] < limits[i]]
    heapq.heapify(next_units)
    missing = budget - sum(taken)
    while missing > 0:
        _, i = heapq.heappop(next_units)
        taken[i] += 1
        missing -= 1
        if taken[i] < limits[i]:
            heapq.heappush(next_units, ((taken[i] + 0.5) / shares[i], i))

    last_units = [(-(taken[i] - 0.5) / shares[i], -i) for i in range(len(limits)) if taken[i] > 0]
    heapq.heapify(last_units)
    while missing < 0:
        _, negative = heapq.heappop(last_units)
        i = -negative
        taken[i] -= 1
        missing += 1
        if taken[i] > 0:
            heapq.heappush(last_units, (-(taken[i] - 0.5) / shares[i], -i))
    return taken


def _scale(limits: Sequence[int], shares: Sequence[float], budget: int) -> float:
    """The scale at which sum(min(limit, scale * share)) is the budget: layers reach their limit one by one."""
    order = sorted(range(len(limits)), key=lambda i: limits[i] / shares[i])
    rest, free = float(budget), sum(shares)
    scale = 0.0
    for i in order:
        scale = rest / free
        if scale * shares[i] <= limits[i]:
            break
        rest -= limits[i]
        free -= shares[i]
    return scale
