"""Convolutions and linear layers under SWAT: stock layers with their dense weight, and another way to compute.

A layer is adapted in place, by its class: it keeps its parameters, hooks and state dict. The weight stays dense and
trains as ever; forward and input gradient use the active weights alone, the weight gradient what is kept of the input.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.nn import stock_type
from sparse_ft.ops import BATCH_LAST, CONTIGUOUS, is_batch_last, native_reason
from sparse_ft.ops.compact import Compact, nth_magnitude
from sparse_ft.ops.gradients import to_layout
from sparse_ft.tables import format_table
from sparse_ft.when_imported import when_imported

from .active import Active, Operands
from .products import Products


@dataclass
class State:
    """What a layer needs beside its parameters.

    Attributes:
        active: the weights in use.
        keep: fraction of the input that is kept.
        threshold: magnitude above which values of the input are kept; None for one that the next forward pass of the
            training finds.
        kept, seen: values that were kept and all that were seen, since they were set to 0.
    """

    products: Products
    active: Active
    keep: float
    threshold: float | None = None
    kept: int = field(default=0)
    seen: int = field(default=0)

    def compress(self, x: Tensor, training: bool) -> "Compact | Tensor":
        """What the weight gradient will need of an input; only a training finds thresholds and counts."""
        threshold = self.threshold
        if threshold is None and x.numel():
            # At most so many are above it; where fewer are not zero, all of these.
            threshold = nth_magnitude(x, min(int(self.keep * x.numel()), x.numel() - 1))
        threshold = threshold or 0.0
        kept = self.products.keep(x, threshold)
        if training:
            self.threshold = threshold
            self.seen += x.numel()
            self.kept += kept.values.numel() if isinstance(kept, Compact) else int(torch.count_nonzero(kept))
        return kept

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, training: bool) -> Tensor:
        """The output of the layer, with its gradients if they are wanted."""
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
            return _Product.apply(x, weight, bias, self, training)
        return self.products.forward(x, self.active.operands(weight, *x.shape[2:]), bias, training=False)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, state: State, training: bool) -> Tensor:
        weights = state.active.operands(weight, *x.shape[2:])
        ctx.products, ctx.pattern, ctx.of_weight = state.products, weights.pattern, weights[2:]
        ctx.shape, ctx.dtype = x.shape, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.compact = None
        y = state.products.forward(x, weights, bias, training)
        kept: tuple[Tensor, ...] = ()
        if ctx.needs_input_grad[1]:
            compressed = state.compress(x.detach(), training)
            if isinstance(compressed, Compact):
                kept = compressed.bits, compressed.start, compressed.values
                ctx.compact = compressed.shape, compressed.flat, compressed.column_step
            else:
                kept = (compressed,)
        ctx.save_for_backward(weights.values, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, *kept = ctx.saved_tensors
        grad, weights = _in_layout(grad), Operands(ctx.pattern, values, *ctx.of_weight)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.products.input_grad(grad, weights, ctx.shape)
        if ctx.needs_input_grad[1]:
            whole = kept[0] if ctx.compact is None else Compact(*kept, *ctx.compact)
            grad_weight = ctx.products.weight_grad(grad, whole, weights, ctx.shape).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None


def _in_layout(x: Tensor) -> Tensor:
    if type(x) is not Tensor:
        x = x.view_as(x)  # a norm's deferred output has no memory yet
    if native_reason(x) is not None or is_batch_last(x):
        return x
    return to_layout(x, BATCH_LAST)


class SWATLayer(nn.Module):
    """A layer that computes with its active weights."""

    swat: State


class SWATConv2d(SWATLayer, nn.Conv2d):
    """A convolution under SWAT; its output is in batch-last layout, as that of a sparse convolution."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        return self.swat.apply(_in_layout(x), self.weight, self.bias, self.training)


class SWATLinear(SWATLayer, nn.Linear):
    """A linear layer under SWAT: a 1x1 convolution of as many samples as there are tokens."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.in_features, 1, 1)
        weight = self.weight.view(*self.weight.shape, 1, 1)
        y = self.swat.apply(_in_layout(tokens), weight, self.bias, self.training)
        if native_reason(y) is None:
            y = to_layout(y, CONTIGUOUS)
        return y.view(*x.shape[:-1], self.out_features)


_ADAPTED: dict[type, type[SWATLayer]] = {nn.Conv2d: SWATConv2d, nn.Linear: SWATLinear}


def _stay_out_of_compiled_code() -> None:
    for layer in _ADAPTED.values():
        layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[method-assign]


# Disabling imports the compiler, which takes as long as torch itself: it waits for someone who compiles.
when_imported("torch._dynamo", _stay_out_of_compiled_code)


def obstacle(module: nn.Module) -> str:
    """Why a layer cannot be adapted, or nothing."""
    kind = stock_type(module)
    if kind not in _ADAPTED and kind not in _ADAPTED.values():
        return f"{type(module).__name__} is neither Linear nor Conv2d"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"padding mode {module.padding_mode!r}"
    return ""


def adapt(module: nn.Module, state: State) -> None:
    """Lets a stock layer compute by `state`, in place."""
    kind = stock_type(module)
    module.__class__ = _ADAPTED.get(kind, kind)
    module.swat = state  # type: ignore[assignment]


def restore(module: nn.Module) -> None:
    """The inverse of `adapt`."""
    for stock, adapted in _ADAPTED.items():
        if type(module) is adapted:
            module.__class__ = stock
            del module.swat


def swat_layers(model: nn.Module) -> dict[str, SWATLayer]:
    """The layers of a model that are under SWAT, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SWATLayer)}


def describe(model: nn.Module) -> str:
    """A table of the layers under SWAT: how sparse they are, and which of their products run on sparse kernels."""
    rows = []
    for name, layer in swat_layers(model).items():
        state = layer.swat
        used = state.products.operations
        done = used.forward + used.input_grad + used.weight_grad
        weight: Tensor = layer.get_parameter("weight")
        rows.append([
            name, "x".join(map(str, weight.shape)), f"{1 - int(state.active.mask(weight).sum()) / weight.numel():.1%}",
            f"{1 - state.kept / state.seen:.1%}" if state.seen else "",
            *(state.products.forms.get(product, "") for product in ("forward", "input_grad", "weight_grad")),
            f"{done / used.dense:.1%}" if used.dense else "",
        ])  # fmt: skip
    headers = ["layer", "weight", "sparsity", "of inputs", "forward", "input grad", "weight grad", "multiply-adds"]
    return format_table(headers, rows)
