"""A depthwise convolution between two batch norms, in training.

None of the three mixes channels, so that one pass over a channel does what three would do, and on the way back one
what four would (csrc/norm_depthwise.cpp). The convolution takes the activated norm before it unfinished and gives a
tensor that is not computed yet, and the norm after it computes both. Whether a norm follows is learned, and whether
nobody else reads the activation, as in deferred.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparse_ft.nn.deferred import (
    Deferred,
    Operands,
    PendingNorm,
    pending_of,
    placed,
    take_alone,
)
from sparse_ft.ops import Activation, native_reason
from sparse_ft.ops.gradients import (
    batch_norm,
    batch_norm_backward,
    conv2d,
    conv2d_input_grad,
    conv2d_weight_grad,
    norm_depthwise,
    norm_depthwise_backward,
)
from sparse_ft.ops.schema import conv2d_output_shape

if TYPE_CHECKING:
    from sparse_ft.nn.conv import SparseConv2d


class PendingDepthwise(Operands):
    """The operands of a depthwise convolution, whose input is an unfinished norm."""

    what = "a depthwise convolution, of the norm before it"
    activation, residual = Activation.IDENTITY, None

    def __init__(self, conv: SparseConv2d, norm: PendingNorm):
        self.conv, self.norm = conv, norm
        self.values, self.pattern, self.geometry = conv.weight, conv.pattern.tensors, conv.geometry
        self.inner = norm.operands()
        self.shape = torch.Size(conv2d_output_shape(norm.shape, *self.geometry))
        self.dtype, self.device = norm.dtype, norm.device
        self.grad_enabled, self.inference = True, False
        self._seen, self._versions = norm._seen, norm._versions
        self._see(self.values)

    def takes(self, residual: Tensor) -> bool:
        return False

    def added(self, residual: Tensor) -> PendingDepthwise:
        raise NotImplementedError("nothing is added to a convolution")

    def activated(self, activation: Activation) -> None:
        return None

    def may_wait(self) -> bool:
        return False

    def looked_at(self) -> None:
        """Somebody wants the convolution's result, which need not have waited."""
        self.conv._norm_follows.lose()

    def compute(self) -> Tensor:
        self.check()
        x, weight, bias, mean, _, activation = self.inner
        norm = self.norm
        activated = batch_norm(
            x, weight, bias, mean, norm.variance, norm.eps, None, activation, norm.training
        )[0]  # fmt: skip
        return conv2d(activated, self.values, None, self.pattern, *self.geometry)

    def defer(self) -> Deferred:
        deferred = _DeferDepthwise.apply(*self.inner[:3], self.values, self)
        return placed(deferred)

    def measured(self) -> tuple[Tensor, Tensor, Tensor]:
        """(result, its mean, its biased variance)"""
        self.check()
        return norm_depthwise(
            *self.inner, self.norm.training, self.values, None, self.pattern, *self.geometry
        )  # fmt: skip

    def followed_by(self, norm: PendingNorm) -> Deferred:
        return _DeferBetween.apply(*self.inner[:3], self.values, norm.weight, norm.bias, self, norm)


class _DeferDepthwise(torch.autograd.Function):
    """The place in the graph of a convolution that no norm has joined yet; what it computes is for those who want it
    without one."""

    @staticmethod
    def forward(ctx, x, weight, bias, values, pending):
        ctx.save_for_backward(x, weight, bias, values, *pending.inner[3:5], pending.norm.variance, *pending.pattern)
        ctx.activation, ctx.training, ctx.eps = pending.inner[5], pending.norm.training, pending.norm.eps
        ctx.geometry = pending.geometry
        ctx.set_materialize_grads(False)
        return Deferred(pending)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, values, mean, rstd, variance, *pattern = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * 5
        if grad is None:
            return tuple(grads)
        if needs[3]:
            activated = batch_norm(x, weight, bias, mean, variance, ctx.eps, None, ctx.activation, ctx.training)[0]
            value_grad = conv2d_weight_grad(grad, activated, pattern, *ctx.geometry)
            grads[3] = value_grad.to(values.dtype).view_as(values)
        if any(needs[:3]):
            grad = conv2d_input_grad(grad, values, pattern, *ctx.geometry, list(x.shape))
            of_norm = batch_norm_backward(grad, x, weight, bias, mean, rstd, None, None, ctx.activation, ctx.training)
            grads[:3] = [of if needed else None for of, needed in zip(of_norm, needs[:3], strict=False)]
        return tuple(grads)


class _DeferBetween(torch.autograd.Function):
    """The place in the graph of the norm after the convolution: the gradients of all three."""

    @staticmethod
    def forward(ctx, x, weight, bias, values, outer_weight, outer_bias, pending, norm):
        ctx.save_for_backward(
            x, weight, bias, values, *pending.inner[3:5], norm.x, outer_weight, outer_bias, norm.mean, norm.rstd,
            *pending.pattern,
        )  # fmt: skip
        ctx.inner_activation, ctx.training = pending.inner[5], pending.norm.training
        ctx.activation, ctx.geometry = norm.activation, pending.geometry
        ctx.set_materialize_grads(False)  # an activation in place leaves none for what was there before it
        return Deferred(norm)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 8
        (
            x, weight, bias, values, mean, rstd, y, outer_weight, outer_bias, outer_mean, outer_rstd, *pattern
        ) = ctx.saved_tensors  # fmt: skip
        grad_x, grad_weight, grad_bias, value_grad, *outer_grads = norm_depthwise_backward(
            grad, y, outer_weight, outer_bias, outer_mean, outer_rstd,
            ctx.activation, x, weight, bias, mean, rstd, ctx.inner_activation, ctx.training, values, pattern,
            *ctx.geometry,
        )  # fmt: skip
        grads = (grad_x, grad_weight, grad_bias, value_grad.to(values.dtype).view_as(values), *outer_grads)
        return *(of if needed else None for of, needed in zip(grads, ctx.needs_input_grad, strict=False)), None, None


def defer_depthwise(conv: SparseConv2d, x: Tensor) -> Tensor | None:
    """The convolution's output for `x`, deferred; None where it is to be computed at once."""
    shape = conv.geometry[0]
    if type(x) is not Deferred or shape[1] != 1 or shape[0] != conv.groups or conv.groups == 1:
        return None
    if conv._norm_follows.lost or conv.bias is not None or native_reason(weights=(conv.weight,)) is not None:
        return None
    taken, x = take_alone(x)
    if taken is not None:
        return PendingDepthwise(conv, taken).defer()
    return None if type(x) is Deferred else conv.forward(x)


def join_depthwise(norm: nn.BatchNorm2d, x: Deferred) -> tuple[Tensor, Tensor, Tensor, PendingDepthwise] | None:
    """(y, mean, variance, what y came from) of a deferred convolution that `norm` follows; None where `x` is none."""
    pending = pending_of(x)
    if type(pending) is not PendingDepthwise or norm.num_features != pending.shape[1]:
        return None
    if pending.shape.numel() // pending.shape[1] < 2:
        return None
    with torch.no_grad():
        return *pending.measured(), pending
