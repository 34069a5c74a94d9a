"""A norm's statistics: those that a convolution takes of its results on the way, and small arithmetic on them, in one
call each, since for so few numbers every call of torch counts.
"""

import ctypes

import torch
from torch import Tensor

from sparse_ft.ops import _native
from sparse_ft.ops.by_tensor import ByTensor
from sparse_ft.ops.calls import plain


class Moments:
    """Where a convolution puts the mean and the biased variance of its results, by channel, if it can take them as it
    stores these: reading everything once more for them took a twentieth of a training step."""

    __slots__ = ("mean", "variance", "version")

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.variance: Tensor | None = None
        self.version = 0  # of the results that they were taken of


_moments: ByTensor[Moments] = ByTensor()  # of results that have not changed since


def keep_moments(y: Tensor, moments: Moments) -> None:
    """Remembers what was taken of `y`, if anything was."""
    if moments.mean is not None and not y.is_inference():
        moments.version = y._version
        _moments.keep(y, moments)


def moments_of(y: Tensor) -> tuple[Tensor, Tensor] | None:
    """(mean, biased variance) of a convolution's result, if they were taken and it is what it was then."""
    moments = _moments.get(y)
    if moments is None or moments.version != y._version:
        return None
    assert moments.mean is not None and moments.variance is not None
    return moments.mean, moments.variance


def reciprocal_deviation(variance: Tensor, eps: float) -> Tensor:
    """1 / sqrt(variance + eps), in the native norm's steps and so to its last bit, whoever computes the norm."""
    rstd = _native.reciprocal_deviation(variance, eps) if plain(variance) else None
    if rstd is not None:
        return rstd
    return (variance.double() + ctypes.c_float(eps).value).sqrt_().reciprocal_().to(variance.dtype)


def update_running(
    batches: Tensor,
    running: tuple[Tensor, Tensor],
    measured: tuple[Tensor, Tensor],
    momentum: float | None,
    count: int,
) -> None:
    """One more batch in a norm's running statistics, in place, as torch's own norm does it.

    Args:
        batches: int64, one number: how many there were.
        running, measured: mean and variance of every channel; the measured one is biased.
        momentum: the batch's share; None takes averages over all batches.
        count: values of a channel.
    """
    tensors = batches, *running, *measured
    if plain(*tensors) and _native.update_running(*tensors, momentum, count / (count - 1)):
        torch.autograd.graph.increment_version(tensors[:3])
        return
    batches.add_(1)
    share = 1.0 / float(batches) if momentum is None else momentum
    running[0].lerp_(measured[0], share)
    running[1].lerp_(measured[1] * (count / (count - 1)), share)
