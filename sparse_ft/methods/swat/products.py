"""The three products of a layer under SWAT, each in the form that is faster where it runs.

Sparse: with the weight's nonzeros, or with the values that were kept of the input. Dense: torch's kernels on the same
numbers, zeros in between. Which is faster depends on shapes and sparsities, and is measured.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_ft.ops import BATCH_LAST, CHANNELS_LAST, is_batch_last, native_reason
from sparse_ft.ops.compact import Compact, compact, weight_grad
from sparse_ft.ops.gradients import conv2d, conv2d_input_grad, to_layout
from sparse_ft.ops.native import compute_plainly
from sparse_ft.tune import TimingCache, duel

from .active import Geometry, Operands

SPARSE, DENSE = "sparse", "dense"
_BUDGET_S = 0.1  # for measuring one product
_WORTH_GENERATING = 2000  # lanes x steps for which a pattern's generated code repays the time that making it takes


@dataclass
class Operations:
    """Multiply-adds that the kernels have done, and those of the same products with dense operands.

    Neither counts weights that meet padding alone.
    """

    forward: int = 0
    input_grad: int = 0
    weight_grad: int = 0
    dense: int = 0


@dataclass
class Products:
    """The products of one layer on 4-D activations; they remember their form and count what they do.

    Attributes:
        policy: "auto" measures the forms of each product at its first use, "always" is sparse, "none" dense.
        period: steps for which a pattern is in use.
        forms: product -> "sparse" or "dense", as far as it is decided.
    """

    geometry: Geometry
    policy: str
    period: int
    cache: TimingCache | None = None
    forms: dict[str, str] = field(default_factory=dict)
    operations: Operations = field(default_factory=Operations)

    def forward(self, x: Tensor, weights: Operands, bias: Tensor | None, training: bool) -> Tensor:
        """The output; outside of training nothing is decided and nothing counted."""
        g = self.geometry

        def sparse() -> Tensor:
            return conv2d(x, weights.values, bias, weights.pattern, *g)

        def dense() -> Tensor:
            top, left, bottom, right = g.padding
            source, padding = _for_torch(x), (top, left)
            if (top, left) != (bottom, right):
                source, padding = F.pad(source, (left, right, top, bottom)), (0, 0)
            weight = weights.dense().to(x.dtype)
            shift = None if bias is None else bias.to(x.dtype)
            return _from_torch(F.conv2d(source, weight, shift, g.stride, padding, g.dilation, g.groups))

        form = self._form("forward", x, weights, sparse, dense, decides=training)
        if training and form == SPARSE and (x.shape[0] * x.shape[2] * x.shape[3]) * self.period < _WORTH_GENERATING:
            compute_plainly(weights.pattern)
        y = sparse() if form == SPARSE else dense()
        if training:
            self.operations.forward += self._count(y, weights, form)
        return y

    def input_grad(self, grad: Tensor, weights: Operands, shape: torch.Size) -> Tensor:
        g = self.geometry

        def sparse() -> Tensor:
            return conv2d_input_grad(grad, weights.values, weights.pattern, *g, list(shape))

        def dense() -> Tensor:
            x = grad.new_empty(1).expand(shape)  # its values are not looked at
            return _dense_backward(g, grad, x, weights.dense(), 0)

        form = self._form("input_grad", grad, weights, sparse, dense)
        grad_x = sparse() if form == SPARSE else dense()
        self.operations.input_grad += self._count(grad, weights, form)
        return grad_x

    def keep(self, x: Tensor, threshold: float) -> "Compact | Tensor":
        """What the weight gradient needs of an input: its values whose magnitude is above a threshold."""
        g = self.geometry.of_input(x.shape)
        x = x if g is self.geometry else x.reshape(x.shape[0], -1, 1, 1)
        if native_reason(weights=(x,)) is None:  # float32 alone has a compact form
            return compact(x, threshold, flat=g.flat, column_step=g.stride[1])
        return torch.where(x.abs() <= threshold, 0.0, x)

    def weight_grad(self, grad: Tensor, kept: "Compact | Tensor", weights: Operands, shape: torch.Size) -> Tensor:
        """The dense weight's gradient from what was kept of an input of that shape."""
        g = self.geometry.of_input(shape)
        done = 0

        def sparse() -> Tensor:
            nonlocal done
            assert isinstance(kept, Compact)
            result, done = weight_grad(kept, grad, *g)
            return result

        def dense() -> Tensor:
            x = kept if isinstance(kept, Tensor) else kept.to_dense()
            return _dense_backward(g, grad, x, grad.new_empty(1).expand(g.weight_shape), 1)

        form = self._form("weight_grad", grad, weights, sparse, dense)
        if form == SPARSE and isinstance(kept, Compact) and not math.isfinite(float(kept.values.sum())):
            form = DENSE  # the kernel multiplies with zeros around the output, where an infinite input gives NaN
        result = sparse() if form == SPARSE else dense()
        every = self._count(grad, weights, DENSE)
        self.operations.weight_grad += done if form == SPARSE else every
        return result.view(self.geometry.weight_shape)

    def _form(
        self, product: str, x: Tensor, weights: Operands, sparse: Callable, dense: Callable, decides: bool = True
    ) -> str:
        if native_reason(weights=(x,)) is not None or self.policy == "none":
            return DENSE
        if product not in self.forms:
            if self.policy == "always" or not decides or x.numel() == 0:
                return SPARSE
            assert self.cache is not None
            density = weights.values.numel() / max(1, self.geometry.weight_shape[0] * weights.columns)
            numbers = *self.geometry, *x.shape, round(density, 2), torch.get_num_threads()
            key = f"swat {product} {numbers}"
            timing = self.cache.get(key, lambda: duel({DENSE: dense}, sparse, _BUDGET_S))
            self.cache.save()
            self.forms[product] = SPARSE if timing.sparse_ms < timing.dense_ms else DENSE
        return self.forms[product]

    def _count(self, y: Tensor, weights: Operands, form: str) -> int:
        """Multiply-adds at the positions of the output, of weights that meet an input."""
        positions = y.numel() // max(1, y.shape[1])
        every = positions * self.geometry.weight_shape[0] * weights.columns
        self.operations.dense += every
        return every if form == DENSE else positions * weights.values.numel()


def _dense_backward(g: Geometry, grad: Tensor, x: Tensor, weight: Tensor, which: int) -> Tensor:
    """The gradient of a dense convolution's input (0) or weight (1); the values of that one are not looked at."""
    top, left, bottom, right = g.padding
    padding, uneven = (top, left), (top, left) != (bottom, right)
    n, c, h, w = x.shape
    if uneven:
        padding, whole = (0, 0), (n, c, h + top + bottom, w + left + right)
        x = x.new_empty(1).expand(whole) if which == 0 else F.pad(_for_torch(x), (left, right, top, bottom))
    gradient = torch.ops.aten.convolution_backward(
        _for_torch(grad), _for_torch(x), weight.to(grad.dtype), None, g.stride, padding, g.dilation, False, (0, 0),
        g.groups, (which == 0, which == 1, False),
    )[which]  # fmt: skip
    if which == 1:
        return gradient.contiguous()
    return _from_torch(gradient[:, :, top : top + h, left : left + w] if uneven else gradient)


def _for_torch(x: Tensor) -> Tensor:
    """In a layout that torch's convolutions are fast in."""
    if native_reason(x) is None and is_batch_last(x) and not x.is_contiguous():
        return to_layout(x, CHANNELS_LAST)
    return x


def _from_torch(y: Tensor) -> Tensor:
    return y if native_reason(y) is not None or is_batch_last(y) else to_layout(y, BATCH_LAST)
