"""A convolution's output that waits to see what follows, in evaluation without gradients.

What follows a convolution there (a norm with fixed statistics, a residual, an activation) is arithmetic on values that
the convolution has in its hands: the kernel does it as it stores them, and the passes over memory are saved. So the
convolution gives a tensor that is not computed yet (see deferred.py). Norms, sums and activations join; whatever else
looks at it gets the plain result.

A pass of a single image has little arithmetic in a layer, and interpreter time counts: what can be checked once is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparse_ft.nn.deferred import Deferred, Operands, pending_of, result_of
from sparse_ft.ops import BATCH_LAST, Activation, is_batch_last
from sparse_ft.ops.allocation import ELEMENTS
from sparse_ft.ops.calls import transformed
from sparse_ft.ops.gradients import conv2d, conv2d_norm, to_layout
from sparse_ft.ops.schema import conv2d_output_shape

if TYPE_CHECKING:
    from sparse_ft.nn.conv import SparseConv2d

_NO_NORM = (None, None, None, None, 0.0)


class PendingConv(Operands):
    """A convolution's operands, and those of what is to follow it."""

    what = "a convolution"

    def __init__(self, owner: SparseConv2d, x: Tensor):
        values, bias = owner._parameters["weight"], owner._parameters["bias"]
        self.owner, self.x, self.weights = owner, x, (values, bias, owner.pattern.tensors, *owner.geometry)
        self.shape = torch.Size(conv2d_output_shape(x.shape, *owner.geometry))
        self.dtype, self.device = x.dtype, x.device
        self.grad_enabled, self.inference = False, torch.is_inference_mode_enabled()
        self.norm: tuple = _NO_NORM  # weight, bias, mean, variance, eps
        self.residual: Tensor | None = None
        self.activation = Activation.IDENTITY
        self._see(x, values, bias)

    @property
    def _bare(self) -> bool:
        return self.norm is _NO_NORM and self.residual is None and not self.activation

    def normalised(self, norm: nn.BatchNorm2d) -> PendingConv | None:
        """With a norm; None where it does not fit in."""
        if norm.training or not self._bare or norm.num_features != self.shape[1]:
            return None
        parameters, buffers = norm._parameters, norm._buffers
        tensors = parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]
        if buffers["running_mean"] is None or not all(map(_is_known, tensors)):
            return None
        if any(tensor is not None and tensor.numel() != self.shape[1] for tensor in tensors):
            return None
        other = self._copy()
        other.norm = (*tensors, norm.eps)
        other._see(*tensors)
        return other

    def takes(self, residual: Tensor) -> bool:
        return _is_known(residual, self.dtype) and residual.shape == self.shape

    def added(self, residual: Tensor) -> PendingConv:
        other = self._copy()
        other.residual = residual
        other._see(residual)
        return other

    def activated(self, activation: Activation) -> PendingConv:
        other = self._copy()
        other.activation = activation
        return other

    def may_wait(self) -> bool:
        """Nothing is left to wait for after an activation."""
        return False

    def looked_at(self) -> None:
        """Somebody wants the result. That of the convolution alone need not have waited."""
        if self._bare:
            self.owner._patience.lose()

    def compute(self) -> Tensor:
        self.check()
        if self._bare:
            return conv2d(self.x, *self.weights)
        return conv2d_norm(self.x, *self.weights, *self.norm, self.residual, self.activation)

    def defer(self) -> Deferred:
        return Deferred(self)


def _is_known(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the native kernels take a tensor, if there is one, and it would be seen if it changed."""
    return tensor is None or (tensor.dtype is dtype and tensor.is_cpu and not tensor.is_inference())


def defer_conv(conv: SparseConv2d, x: Tensor) -> Tensor | None:
    """The convolution's output for `x`, deferred; None where it is to be computed at once."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or conv._patience.lost:
        return None
    if type(x) is Deferred:
        pending = pending_of(x)
        if pending is not None and pending.activation:
            return None  # it may be taken unfinished
        x = result_of(x)
    if type(x) is not Tensor or x.dim() != 4 or not x.is_cpu or x.dtype not in ELEMENTS:
        return None
    conv._take_back()
    values, bias = conv._parameters["weight"], conv._parameters["bias"]
    if not (_is_known(values) and _is_known(bias)) or transformed():
        return None
    if not is_batch_last(x):
        x = to_layout(x, BATCH_LAST)
    if x.is_inference():
        return None
    return PendingConv(conv, x).defer()


def join_norm(norm: nn.BatchNorm2d, x: Deferred, activation: Activation | None) -> Tensor | None:
    """`norm` of a deferred convolution, activated; `None` for an activation that may follow. None where `x` is
    nothing that the norm can join."""
    pending = pending_of(x)
    joined = pending.normalised(norm) if type(pending) is PendingConv else None
    if joined is None:
        return None
    if activation is None:
        return joined.defer()
    joined.activation = activation
    return joined.compute()
