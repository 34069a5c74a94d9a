"""Whether an operator's arguments fit together: dimensions, sizes, types, devices.

The native core gets addresses, not tensors: whatever it could not survive is found here. What the index tensors
hold is checked by the core as it reads them.
"""

import functools

import torch
from torch import Tensor

from sparse_ft.ops.activations import Activation
from sparse_ft.ops.layout import LAYOUTS

_NAMES = ("row_ptr", "col", "t_row_ptr", "t_col", "perm")


def check_weight(pattern: list[Tensor], values: Tensor | None, bias: Tensor | None, rows: int, t_rows: int) -> None:
    """A weight of `rows` rows: its pattern (`t_rows` transposed rows), its values and the bias.

    Raises:
        ValueError: for a tensor of another size, type or device.
    """
    if len(pattern) != len(_NAMES):
        raise ValueError(f"malformed sparse pattern: it has {len(_NAMES)} index tensors, not {len(pattern)}")
    if _fits(pattern, values, bias, rows, t_rows):
        return
    nnz = pattern[1].numel()
    for name, tensor, size in zip(_NAMES, pattern, (rows + 1, nnz, t_rows + 1, nnz, nnz), strict=True):
        if tensor.dtype != torch.int32 or tensor.numel() != size or not tensor.is_contiguous():
            raise ValueError(
                f"malformed sparse pattern: {name} must be {size} contiguous int32, "
                f"got {tensor.numel()} of {str(tensor.dtype).removeprefix('torch.')}"
            )
        if values is not None and tensor.device != values.device:
            raise ValueError(f"malformed sparse pattern: {name} is on {tensor.device}, the weight on {values.device}")
    if values is not None and values.numel() != nnz:
        raise ValueError(f"the pattern has {nnz} positions, the weight {values.numel()} values")
    check_channels("bias", bias, rows)


def _fits(pattern: list[Tensor], values: Tensor | None, bias: Tensor | None, rows: int, t_rows: int) -> bool:
    """The same for a weight on the CPU, quickly: every product asks."""
    row_ptr, col, t_row_ptr, t_col, perm = pattern
    nnz = col.numel()
    for tensor in pattern:
        if not (tensor.dtype is torch.int32 and tensor.is_cpu and tensor.is_contiguous()):
            return False
    return (
        row_ptr.numel() == rows + 1
        and t_row_ptr.numel() == t_rows + 1
        and t_col.numel() == perm.numel() == nnz
        and (values is None or (values.is_cpu and values.numel() == nnz))
        and (bias is None or bias.numel() == rows)
    )


def check_channels(name: str, tensor: Tensor | None, channels: int) -> None:
    """A tensor of one value for each channel.

    Raises:
        ValueError: for another number of values.
    """
    if tensor is not None and tensor.numel() != channels:
        raise ValueError(f"{name} must have {channels} values, got {tensor.numel()}")


def check_features(name: str, tensor: Tensor, features: int) -> None:
    """(..., features).

    Raises:
        ValueError: for another last dimension.
    """
    if tensor.dim() == 0 or tensor.shape[-1] != features:
        raise ValueError(f"{name} must have {features} features in its last dimension, got {tuple(tensor.shape)}")


def check_same_shape(name: str, tensor: Tensor, shape) -> None:
    """A gradient and what it is the gradient of.

    Raises:
        ValueError: for another shape.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_image(name: str, shape) -> None:
    """(N, C, H, W).

    Raises:
        ValueError: for another number of dimensions.
    """
    if len(shape) != 4:
        raise ValueError(f"{name} must have four dimensions (N, C, H, W), got {tuple(shape)}")


def check_layout(layout: int) -> None:
    """One of `LAYOUTS`.

    Raises:
        ValueError: for another number.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS} (see sparse_ft.ops.layout), not {layout}")


def check_activation(activation: int) -> None:
    """One of `Activation`.

    Raises:
        ValueError: for another number.
    """
    if not 0 <= activation < len(Activation):
        raise ValueError(f"activation must be one of {list(map(int, Activation))} (see Activation), not {activation}")


def check_probability(p: float) -> None:
    """A number from 0 to 1.

    Raises:
        ValueError: for another one.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"a probability lies between 0 and 1, not {p}")


def check_whole_norm(weight, bias, mean, variance) -> None:
    """A norm with its statistics, or none.

    Raises:
        ValueError: for a part of one.
    """
    if (mean is None) != (variance is None) or (mean is None and (weight is not None or bias is not None)):
        raise ValueError("conv2d_norm takes a norm's mean and variance together, or nothing of a norm")


def check_windows(shape, rows, columns, kernel, dilation) -> None:
    """Windows of a maximum: each has a position within the input, and a tap's number fits into a byte.

    Raises:
        ValueError: where one has none, or the kernel has more than 255 taps.
    """
    if len(kernel) != 2 or len(dilation) != 2 or min(*kernel, *dilation) < 1 or kernel[0] * kernel[1] > 255:
        raise ValueError(f"a pooling kernel has 1 to 255 taps, got {kernel} with dilation {dilation}")
    for size, starts, taps, step in zip(shape[2:], (rows, columns), kernel, dilation, strict=True):
        for first in starts:
            inside = max(0, -(first // step))  # the first tap within
            if inside >= taps or first + inside * step >= size:
                raise ValueError(f"a pooling window that starts at {first} lies outside an input of {size}")


@functools.lru_cache(maxsize=4096)
def check_geometry(weight_shape: tuple, stride: tuple, padding: tuple, dilation: tuple, groups: int) -> None:
    """A convolution's numbers, as far as the arithmetic on shapes needs it; the core has limits of its own.

    Raises:
        ValueError: for another count of numbers, or one below its least value.
    """
    for name, numbers, count, least in (
        ("weight_shape", weight_shape, 4, 0),
        ("stride", stride, 2, 1),
        ("padding", padding, 4, 0),
        ("dilation", dilation, 2, 1),
        ("groups", (groups,), 1, 1),
    ):
        if len(numbers) != count or min(numbers) < least:
            raise ValueError(f"a convolution's {name} must be {count} numbers of at least {least}, got {numbers}")
