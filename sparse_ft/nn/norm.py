"""Batch normalisation that keeps batch-last layout and takes what follows it into its pass over memory.

torch's own batch norm copies a batch-last activation twice, and adding a residual and an activation are passes of
their own. Where the activation is part of the module (timm's BatchNormAct2d) it is computed at once; where the
model's code applies it, the output is deferred until then, and where a sparse convolution reads it, until that does
(see deferred.py). In evaluation without gradients a sparse convolution before the norm does all of it (see
pending_conv.py), and in training a depthwise one computes with the norms on both sides of it (see
pending_depthwise.py).
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from sparse_ft.nn.deferred import Deferred, Patience, PendingNorm
from sparse_ft.nn.module import parameter_of
from sparse_ft.nn.pending_conv import join_norm
from sparse_ft.nn.pending_depthwise import join_depthwise
from sparse_ft.nn.stock import adapts
from sparse_ft.ops import Activation, is_batch_last, native_reason
from sparse_ft.ops._native import takes_norm
from sparse_ft.ops.gradients import batch_norm, batch_norm_statistics
from sparse_ft.ops.statistics import moments_of, update_running


def _keeps_layout(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    weight, bias = _parameters(norm)
    mean = norm._buffers["running_mean"]
    # In one call, where these are what they usually are.
    if type(x) is Tensor and not is_dynamo_compiling() and takes_norm(x, weight, bias, mean):
        return x.shape[1] == norm.num_features
    if x.dim() != 4 or not is_batch_last(x):
        return False
    n, c, h, w = x.shape
    return (
        c == norm.num_features
        and n * h * w > 1  # torch's own error for a single value a channel
        and native_reason(x, weights=(weight, bias, mean)) is None
    )


def _parameters(norm: nn.BatchNorm2d) -> tuple[Tensor | None, Tensor | None]:
    return parameter_of(norm, "weight"), parameter_of(norm, "bias")


def _can_wait(x: Tensor) -> bool:
    # A traced graph has all it needs to fuse by itself. What counts no versions could change unseen.
    if is_dynamo_compiling() or torch.jit.is_tracing():
        return False
    return type(x) is Tensor and not x.is_inference()


_patience: WeakKeyDictionary[nn.Module, Patience] = WeakKeyDictionary()  # of every norm that was used


def _normalise(norm: nn.BatchNorm2d, x: Tensor, activation: Activation | None) -> Tensor:
    """The norm's output, activated; `None` for an activation that may follow."""
    weight, bias = _parameters(norm)
    running = norm._buffers["running_mean"], norm._buffers["running_var"]
    training = norm.training or running[0] is None
    mean, variance = (moments_of(x) or (None, None)) if training else running
    patience = _patience.setdefault(norm, Patience()) if _can_wait(x) else None
    if patience is not None and (activation is None or (activation.cheap and patience.lasts(x))):
        if training:
            if mean is None or variance is None:
                with torch.no_grad():
                    mean, variance = batch_norm_statistics(x)
            # Before anything is saved for backward, where checkpointing may break off its second forward.
            _update_statistics(norm, x, mean, variance)
        assert mean is not None and variance is not None
        return PendingNorm(
            x, weight, bias, mean, variance, norm.eps, training, patience, activation or Activation.IDENTITY
        ).defer()  # fmt: skip
    y, mean, _, variance = batch_norm(
        x, weight, bias, mean, variance, norm.eps, None, activation or Activation.IDENTITY, training
    )
    _update_statistics(norm, x, mean, variance)
    return y


def _join(norm: nn.BatchNorm2d, x: Tensor, activation: Activation | None) -> Tensor | None:
    """The norm of an output that waits for one, activated; None where `x` does not, or the norm cannot join."""
    if type(x) is not Deferred:
        return None
    joined = join_norm(norm, x, activation)
    if joined is not None:
        return joined
    weights = norm.weight, norm.bias, norm.running_mean
    if not (norm.training or norm.running_mean is None) or native_reason(weights=weights) is not None:
        return None
    measured = join_depthwise(norm, x)
    if measured is None:
        return None
    y, mean, variance, before = measured
    _update_statistics(norm, y, mean, variance)
    patience = _patience.setdefault(norm, Patience())
    pending = PendingNorm(
        y, norm.weight, norm.bias, mean, variance, norm.eps, True, patience, activation or Activation.IDENTITY, before
    )
    return pending.defer() if activation is None or pending.may_wait() else pending.compute()


def _update_statistics(norm: nn.BatchNorm2d, x: Tensor, mean: Tensor, variance: Tensor) -> None:
    if not (norm.training and norm.track_running_stats):
        return
    running_mean, running_var, batches = map(norm._buffers.get, ("running_mean", "running_var", "num_batches_tracked"))
    if running_mean is None or running_var is None or batches is None:
        return
    n, _, h, w = x.shape
    update_running(batches, (running_mean, running_var), (mean, variance), norm.momentum, n * h * w)


@adapts("torch.nn", "BatchNorm2d")
class LayoutNorm(nn.BatchNorm2d):
    """torch's batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        joined = _join(self, x, None)
        if joined is not None:
            return joined
        return _normalise(self, x, None) if _keeps_layout(self, x) else super().forward(x)


@adapts("timm.layers", "BatchNormAct2d")
class LayoutNormAct(nn.BatchNorm2d):
    """timm's batch norm with its activation inside."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        activation = _activation_of(self.act) if type(self.drop) is nn.Identity else None
        joined = _join(self, x, activation)
        if joined is not None:
            return joined if activation is not None else self.act(self.drop(joined))
        if not _keeps_layout(self, x):
            return super().forward(x)
        if activation is None:
            return self.act(self.drop(_normalise(self, x, None)))
        return _normalise(self, x, activation)


def _activation_of(module: nn.Module) -> Activation | None:
    """What the module computes, if a norm can; hooks want its call."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    if type(module) is nn.GELU:
        return Activation.GELU if module.approximate == "none" else Activation.GELU_TANH
    return _ACTIVATIONS.get(type(module))


_ACTIVATIONS = {
    nn.ReLU: Activation.RELU,
    nn.ReLU6: Activation.RELU6,
    nn.SiLU: Activation.SILU,
    nn.Hardswish: Activation.HARDSWISH,
}
