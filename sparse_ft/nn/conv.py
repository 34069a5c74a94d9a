"""Sparse 2-D convolution."""

import torch
from torch import Tensor, nn

from sparse_ft.nn.deferred import Patience, take_unfinished
from sparse_ft.nn.module import SparseModule, in_autocast_dtype, parameter_of
from sparse_ft.nn.pending_conv import defer_conv
from sparse_ft.nn.pending_depthwise import defer_depthwise
from sparse_ft.ops import BATCH_LAST, SparsePattern, is_batch_last
from sparse_ft.ops.gradients import conv2d, conv2d_of_unfinished, to_layout
from sparse_ft.ops.statistics import Moments, keep_moments


def padding_of(conv: nn.Conv2d) -> tuple[int, int, int, int]:
    """(top, left, bottom, right). "same" puts the odd row or column below and to the right, as torch does."""
    if conv.padding == "valid":
        return (0, 0, 0, 0)
    if conv.padding == "same":
        height, width = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
        top, left = height // 2, width // 2
        return (top, left, height - top, width - left)
    assert not isinstance(conv.padding, str)
    top, left = conv.padding
    return (top, left, top, left)


class SparseConv2d(SparseModule):
    """A 2-D convolution with a sparse weight, computing with its nonzeros only, forward and backward.

    Input (N, C, H, W) or (C, H, W) in any layout; output (N, O, OH, OW) in batch-last layout, which the next
    sparse convolution takes as it is. Any kernel size, stride, zero padding, dilation and groups.

    Source: SparseProp (Nikdan et al., ICML 2023).
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode = "zeros"
    geometry: tuple[tuple[int, ...], tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]
    """Weight shape, stride, padding, dilation and groups, as the operators take them."""

    def __init__(self, conv: nn.Conv2d, pattern: SparsePattern, values: Tensor):
        super().__init__()
        for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
            setattr(self, name, getattr(conv, name))
        self._padding = padding_of(conv)
        self._patience, self._norm_follows = Patience(), Patience()  # without gradients, and with them
        self._set_weight(pattern, values, conv.bias, conv.weight)
        self.geometry = pattern.weight_shape, self.stride, self._padding, self.dilation, self.groups

    @classmethod
    def from_dense(cls, conv: nn.Conv2d, mask: Tensor | None = None) -> "SparseConv2d":
        """A sparse layer with the nonzeros of `conv` (or the positions of `mask`); the bias is shared.

        Raises:
            ValueError: for a padding mode other than zeros.
        """
        if conv.padding_mode != "zeros":
            raise ValueError(f"SparseConv2d pads with zeros only, not {conv.padding_mode!r}: leave this layer dense")
        pattern, values = SparsePattern.build(
            conv.weight, mask, stride=conv.stride, padding=padding_of(conv)[:2], dilation=conv.dilation,
            groups=conv.groups,
        )  # fmt: skip
        return cls(conv, pattern, values).train(conv.training)

    def to_dense(self) -> nn.Conv2d:
        """The exact dense convolution; the bias is shared."""
        dense = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            self.groups, self.bias is not None, device="meta",
        )  # fmt: skip
        dense.weight = nn.Parameter(self.dense_weight(), requires_grad=self.weight.requires_grad)
        dense.bias = self.bias
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        x = in_autocast_dtype(x)
        if not (self.training or torch.is_grad_enabled()):
            deferred = defer_conv(self, x)
            if deferred is not None:
                return deferred
        self._before_forward(x)
        deferred = defer_depthwise(self, x)
        if deferred is not None:
            return deferred
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        values, bias = parameter_of(self, "weight"), parameter_of(self, "bias")
        weights = (values, bias, self.pattern.tensors, *self.geometry)
        # By itself a depthwise convolution reads a value for little more than memory's time: it has none for a norm.
        depthwise = self.geometry[0][1] == 1
        norm = None if depthwise else take_unfinished(x)
        # Not learned from what follows: a norm's statistics so are the same to the last bit whatever ran before.
        moments = Moments() if self.training and bias is None and not depthwise else None
        if norm is not None:
            y = conv2d_of_unfinished(x, norm.operands(), *weights, moments)
        else:
            if not is_batch_last(x):
                x = to_layout(x, BATCH_LAST)
            y = conv2d(x, *weights, moments)
        if moments is not None:
            keep_moments(y, moments)
        return y

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if any(self._padding):
            text += f", padding={self.padding!r}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        return text + f", bias={self.bias is not None}, sparsity={self.sparsity:.4f}"
