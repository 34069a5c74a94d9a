"""Small arithmetic on a norm's statistics, in one call each: for so few numbers every call of torch counts."""

import ctypes

import torch
from torch import Tensor

from sparse_ft.ops import _native
from sparse_ft.ops.calls import transformed


def _plain(*tensors: Tensor) -> bool:
    """Whether the native core takes these, and nobody watches."""
    if torch.compiler.is_compiling() or transformed():
        return False
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
            return False
        if tensor.is_inference() or type(tensor) is not Tensor:
            return False
    return True


def reciprocal_deviation(variance: Tensor, eps: float) -> Tensor:
    """1 / sqrt(variance + eps), in the native norm's steps and so to its last bit, whoever computes the norm."""
    if _plain(variance):
        rstd = torch.empty_like(variance)
        _native.reciprocal_deviation(variance.data_ptr(), variance.numel(), eps, rstd.data_ptr())
        return rstd
    return (variance.double() + ctypes.c_float(eps).value).sqrt_().reciprocal_().to(variance.dtype)


def update_running(running: Tensor, measured: Tensor, momentum: float, correction: float = 1.0) -> None:
    """Moves `running` towards `measured * correction` by the share `momentum`, in place."""
    if _plain(running, measured) and running.numel() == measured.numel():
        _native.update_running(running.data_ptr(), measured.data_ptr(), running.numel(), momentum, correction)
        torch.autograd.graph.increment_version(running)
    else:
        running.lerp_(measured if correction == 1.0 else measured * correction, momentum)
