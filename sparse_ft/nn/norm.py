"""Batch normalisation that keeps batch-last layout.

torch's own batch norm copies a batch-last activation twice. These classes add a forward for that layout to the
stock ones and nothing else: same parameters, buffers, state dict and results.
"""

import functools
import sys

import torch
from torch import Tensor, nn

from sparse_ft.ops import is_batch_last, native_reason


def _keeps_layout(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    return (
        x.dim() == 4
        and x.shape[1] == norm.num_features
        and x.shape[0] * x.shape[2] * x.shape[3] > 1  # torch's own error for a single value a channel
        and is_batch_last(x)
        and native_reason(x, norm.weight, norm.bias, norm.running_mean) is None
    )


def _normalise(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    use_batch = norm.training or norm.running_mean is None
    mean, variance = (None, None) if use_batch else (norm.running_mean, norm.running_var)
    y, mean, _, variance = torch.ops.sparse_ft.batch_norm(x, norm.weight, norm.bias, mean, variance, norm.eps)
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        assert norm.running_var is not None and norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        momentum = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
        count = x.shape[0] * x.shape[2] * x.shape[3]
        with torch.no_grad():
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(variance * (count / (count - 1)), momentum)
    return y


class BatchLastBatchNorm2d(nn.BatchNorm2d):
    """torch's batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return _normalise(self, x) if _keeps_layout(self, x) else super().forward(x)


@functools.cache
def _with_activation(stock: type) -> type:
    """timm's norm with its activation inside; timm is loaded by whoever has such a layer."""

    class BatchLastBatchNormAct2d(stock):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.drop(_normalise(self, x))) if _keeps_layout(self, x) else super().forward(x)

    BatchLastBatchNormAct2d.__qualname__ = BatchLastBatchNormAct2d.__name__  # pickle finds it by `__getattr__`
    return BatchLastBatchNormAct2d


def __getattr__(name: str) -> type:
    if name == "BatchLastBatchNormAct2d":
        from timm.layers import BatchNormAct2d

        return _with_activation(BatchNormAct2d)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _replacement(kind: type) -> type | None:
    if kind is nn.BatchNorm2d:
        return BatchLastBatchNorm2d
    timm = sys.modules.get("timm.layers")
    if timm is not None and kind is timm.BatchNormAct2d:
        return _with_activation(kind)
    return None


def batch_last_norm(module: nn.Module) -> bool:
    """Give a stock batch norm its batch-last forward, in place; False if the module is not one."""
    replacement = _replacement(type(module))
    if replacement is not None:
        module.__class__ = replacement
    return replacement is not None


def stock_norm(module: nn.Module) -> None:
    """The inverse of `batch_last_norm`."""
    stock = type(module).__mro__[1]
    if _replacement(stock) is type(module):
        module.__class__ = stock
