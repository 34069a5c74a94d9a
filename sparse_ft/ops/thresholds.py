"""Patterns of the weights whose magnitude reaches a threshold, in one pass over them: for sets that change often."""

import torch
from torch import Tensor

from sparse_ft.ops import _native, native


def count_at_least(weight: Tensor, threshold: float) -> int:
    """How many of the weights have a magnitude of at least `threshold` and are not zero."""
    if native.native_reason(weights=(weight,)):
        magnitude = weight.detach().abs()
        return int(torch.count_nonzero((magnitude >= threshold) & (magnitude > 0)))
    weight = weight.detach().contiguous()
    row_ptr = torch.empty(weight.shape[0] + 1, dtype=torch.int32)
    return _native.count_rows_above(
        weight.data_ptr(), weight.shape[0], weight.numel() // max(1, weight.shape[0]), threshold, 0, 1,
        row_ptr.data_ptr(), native._threads(weight.numel()),
    )  # fmt: skip


def pattern_at_least(
    weight: Tensor, threshold: float, *, stride, padding, dilation, groups: int, taps: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Index tensors, as a SparsePattern has them, and values of the weights whose magnitude is at least `threshold`.

    Zero is never among them.

    Args:
        weight: float32 on CPU, (O, I/groups, KH, KW).
        stride, padding, dilation, groups: of the convolution; padding counts rows above and columns left.
        taps: uint8 (KH * KW,), 0 for kernel positions to leave out; none of them by default.

    Raises:
        ValueError: for 2**31 nonzeros and more.
    """
    weight = weight.detach().contiguous()
    shape = tuple(weight.shape)
    rows, tap_count = shape[0], shape[2] * shape[3]
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    threads = native._threads(4 * weight.numel())
    row_ptr = torch.empty(rows + 1, dtype=torch.int32)
    nnz = _native.count_rows_above(
        weight.data_ptr(), rows, shape[1] * tap_count, threshold, native._pointer(taps), tap_count,
        row_ptr.data_ptr(), threads,
    )  # fmt: skip
    if nnz >= 2**31:
        raise ValueError(f"a sparse weight holds at most 2**31 - 1 nonzeros, this one of shape {shape} has {nnz}")
    col, t_col, perm = (torch.empty(nnz, dtype=torch.int32) for _ in range(3))
    t_row_ptr = torch.empty(stride[0] * stride[1] * shape[1] * groups + 1, dtype=torch.int32)
    values = torch.empty(nnz)
    _native.build_rows_above(
        native.of_pattern(shape, *geometry), weight.data_ptr(), threshold, native._pointer(taps), row_ptr.data_ptr(),
        col.data_ptr(), values.data_ptr(), t_row_ptr.data_ptr(), t_col.data_ptr(), perm.data_ptr(), threads,
    )  # fmt: skip
    return [row_ptr, col, t_row_ptr, t_col, perm], values
