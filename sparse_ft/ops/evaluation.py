"""A convolution's forward pass outside of torch's dispatcher, for layers that wait to see what follows.

It computes what the operators `conv2d` and `conv2d_norm` compute, from tensors that the caller knows to be plain
ones on the CPU, activations of float32 or bfloat16 and weights of float32. A pass of a single image goes through some
fifty layers in a few milliseconds: what depends on shapes alone is looked up.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_ft.ops import native
from sparse_ft.ops.checks import check_weight
from sparse_ft.ops.layout import BATCH_LAST, empty
from sparse_ft.ops.schema import conv2d_output_shape


class Weights(NamedTuple):
    """A convolution's weights: values, bias, the pattern's tensors, and the geometry as the operators take it."""

    values: Tensor
    bias: Tensor | None
    pattern: list[Tensor]
    geometry: tuple

    def output_shape(self, x: Tensor) -> torch.Size:
        """(N, O, OH, OW); ValueError where the sizes do not fit."""
        return torch.Size(conv2d_output_shape(x.shape, *self.geometry))

    def compute(self, x: Tensor, shape: torch.Size, result: tuple | None) -> Tensor:
        """The convolution of a batch-last tensor.

        Args:
            shape: of the output.
            result: what follows, as `conv2d_norm` takes it: the norm's weight, bias, mean, variance and eps, a
                residual of the output's shape, and an activation.
        """
        values, bias, pattern, geometry = self
        weight_shape, stride, _, _, groups = geometry
        check_weight(pattern, values, bias, weight_shape[0], stride[0] * stride[1] * weight_shape[1] * groups)
        out = empty(shape, BATCH_LAST, x)
        if out.numel() == 0:
            return out
        values = values.contiguous()
        plan = native.plan_conv2d(x.shape, shape, geometry, values.numel(), torch.get_num_threads())
        if result is not None:
            weight, norm_bias, mean, variance, eps, residual, activation = result
            residual = None if residual is None else native.as_batch_last(residual)
            tensors = [None if t is None else t.contiguous() for t in (mean, variance, weight, norm_bias)]
            result = (*tensors, eps, residual, activation)
        bias = None if bias is None else bias.contiguous()
        native.run_conv2d(plan, x, values, bias, pattern, native.programs(pattern), out, None, result)
        return out
