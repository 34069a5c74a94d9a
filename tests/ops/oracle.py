"""What the operators are tested against: the same products in float64, and how far ours may be from them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_ft.ops import BATCH_LAST, CHANNELS_LAST, SparsePattern

# Of the sum of absolute products: 16 units in the last place. Sums are of up to some thousand terms in any order.
RELATIVE = 16 * torch.finfo(torch.float32).eps
# A result that is stored as bfloat16 was summed like one in float32 and is rounded once: by up to half a unit.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2}
DTYPES = [torch.float32, torch.bfloat16]  # of activations


def sparse_weight(shape: tuple[int, ...], density: float, generator: torch.Generator) -> Tensor:
    weight = torch.randn(shape, generator=generator)
    weight *= torch.rand(shape, generator=generator) < density
    if shape[0] > 2 and density < 1:
        weight[1] = 0  # an empty row
    return weight


def pattern_of(weight: Tensor, padding=(0, 0, 0, 0), **geometry) -> tuple[SparsePattern, Tensor]:
    return SparsePattern.build(weight, padding=tuple(padding[:2]), **geometry)


def as_stored(x: Tensor, storage: str) -> Tensor:
    """The same values in another place in memory."""
    if storage == "channels_last":
        return torch.ops.sparse_ft.to_layout(x, CHANNELS_LAST)
    if storage == "batch_last":
        return torch.ops.sparse_ft.to_layout(x, BATCH_LAST)
    if storage == "strided":  # every second column of a wider tensor, its rows reversed in memory order
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if storage == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    assert storage == "contiguous"
    return x.contiguous()


def dense_conv2d(x, weight, bias, stride, padding, dilation, groups) -> Tensor:
    """A convolution as one matrix product a group, a thousand times faster in float64 than torch's own."""
    top, left, bottom, right = padding
    x = F.pad(x, (left, right, top, bottom))
    height, width = (
        (size - d * (k - 1) - 1) // s + 1
        for size, k, d, s in zip(x.shape[2:], weight.shape[2:], dilation, stride, strict=True)
    )
    taps = [
        x[:, :, i : i + (height - 1) * stride[0] + 1 : stride[0], j : j + (width - 1) * stride[1] + 1 : stride[1]]
        for i in range(0, dilation[0] * weight.shape[2], dilation[0])
        for j in range(0, dilation[1] * weight.shape[3], dilation[1])
    ]
    columns = torch.stack(taps, 2).reshape(x.shape[0], groups, -1, height * width)
    y = weight.reshape(groups, weight.shape[0] // groups, -1) @ columns
    y = y.reshape(x.shape[0], weight.shape[0], height, width)
    return y if bias is None else y + bias.view(-1, 1, 1)


def expected(product: Callable[..., Tensor], grad: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Output and gradients of `product(*tensors)` in float64: [output, gradient of each tensor that is not None]."""
    leaves = [None if t is None else t.detach().double().requires_grad_(True) for t in tensors]
    output = product(*leaves)
    output.backward(grad.double())
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def assert_products(got: list[Tensor], product: Callable[..., Tensor], grad: Tensor, *tensors: Tensor | None) -> None:
    """Each result is within rounding of the float64 one; rounding is measured by the sum of absolute products.

    The output and the first gradient are activations, of the type of `grad`, the others float32.
    """
    want = expected(product, grad, *tensors)
    size = expected(product, grad.abs(), *(None if t is None else t.abs() for t in tensors))
    for i, (a, b, scale) in enumerate(zip(got, want, size, strict=True)):
        name = f"gradient of argument {i - 1}" if i else "output"
        assert a.shape == b.shape and a.dtype == (grad.dtype if i < 2 else torch.float32), name
        excess = (a.double() - b).abs() - RELATIVE * scale - ROUNDING[a.dtype] * (b.abs() + RELATIVE * scale)
        assert excess.numel() == 0 or excess.max() <= 1e-30, f"{name}: off by {excess.max()} more than rounding"
