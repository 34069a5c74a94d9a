"""Curves from an initial to a final value."""

import sys

CURVES = ("linear", "cubic", "inverse_cubic")
_EPSILON = sys.float_info.epsilon


def interpolate(x: float, initial: float, final: float, curve: str) -> float:
    """The value at progress `x`, 0 at the beginning and 1 at the end.

    Args:
        curve: "linear", "cubic" (most of the way early: Zhu & Gupta 2017, arXiv 1710.01878) or "inverse_cubic" (most
            of the way late).
    """
    if curve == "linear":
        y = x
    elif curve == "cubic":
        y = 1 - (1 - x) ** 3
    elif curve == "inverse_cubic":
        y = 1 - (1 - x) ** (1 / 3)
    else:
        raise ValueError(f"unknown curve {curve!r}; choose from {', '.join(CURVES)}")
    if y <= _EPSILON:
        return initial
    if y >= 1 - _EPSILON:
        return final
    return y * (final - initial) + initial
