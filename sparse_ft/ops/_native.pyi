"""The native core (csrc/bindings.cpp): addresses and sizes in, ValueError out.

`element` says what activations are stored as: 0 for float32, 1 for bfloat16.
"""

from collections.abc import Sequence
from typing import overload

from typing_extensions import CapsuleType

_Sizes = Sequence[int]
_Norm = tuple[int, int, int, int, int]  # addresses of mean, rstd, weight and bias; the activation
_ResultNorm = tuple[int, int, int, int, float, int, int]  # mean, variance, weight, bias; eps; residual; activation

class Convolution:
    def __init__(self, weight: _Sizes, stride: _Sizes, padding: _Sizes, dilation: _Sizes, groups: int) -> None: ...

class Programs:
    def __init__(self) -> None: ...

def block(element: int, shape: _Sizes, strides: _Sizes) -> CapsuleType: ...
def forward(
    conv: Convolution, element: int, size: _Sizes, x: int, x_stride: _Sizes, out_size: _Sizes, y: int,
    y_stride: _Sizes, row_ptr: int, col: int, values: int, bias: int, nnz: int, programs: Programs | None,
    threads: int, norm: _Norm | None, result: _ResultNorm | None, mean: int, variance: int,
) -> bool: ...  # fmt: skip
def input_grad(
    conv: Convolution, element: int, size: _Sizes, grad: int, grad_stride: _Sizes, out_size: _Sizes, grad_x: int,
    grad_x_stride: _Sizes, t_row_ptr: int, t_col: int, perm: int, values: int, nnz: int, programs: Programs | None,
    threads: int,
) -> None: ...  # fmt: skip
def weight_grad(
    conv: Convolution, element: int, size: _Sizes, x: int, x_stride: _Sizes, out_size: _Sizes, grad: int,
    grad_stride: _Sizes, row_ptr: int, col: int, value_grad: int, row_sums: int, nnz: int, programs: Programs | None,
    threads: int, norm: _Norm | None,
) -> None: ...  # fmt: skip
def norm_depthwise_forward(
    conv: Convolution, element: int, size: _Sizes, x: int, x_stride: _Sizes, out_size: _Sizes, y: int,
    y_stride: _Sizes, row_ptr: int, col: int, values: int, bias: int, nnz: int, threads: int, inner: tuple, mean: int,
    variance: int,
) -> None: ...  # fmt: skip
def norm_depthwise_backward(
    conv: Convolution, element: int, size: _Sizes, x: int, x_stride: _Sizes, out_size: _Sizes, grad: int, y: int,
    y_stride: _Sizes, row_ptr: int, col: int, t_row_ptr: int, t_col: int, perm: int, values: int, nnz: int,
    threads: int, inner: tuple, outer: tuple, grad_x: int, value_grad: int,
) -> None: ...  # fmt: skip
def count_nonzero(weight: int, numel: int, threads: int) -> int: ...
def count_true(mask: int, numel: int, threads: int) -> int: ...
def fingerprint(values: int, count: int) -> int: ...
def build_rows(
    weight: int, mask: int, rows: int, cols: int, row_ptr: int, col: int, values: int, threads: int
) -> None: ...
def build_transpose(
    conv: Convolution, row_ptr: int, col: int, nnz: int, t_row_ptr: int, t_col: int, perm: int
) -> None: ...
def decode_gaps(code: int, size: int, count: int, numel: int, positions: int) -> None: ...
def decode_bitmap(bitmap: int, numel: int, count: int, positions: int) -> None: ...
def unpack(
    weights: list[tuple[int, int, bool, int, int, int, int, int]], threads: int
) -> list[tuple[int, str | None]]: ...
def norm_forward(
    element: int, x: int, residual: int, channels: int, size: int, activation: int, weight: int, bias: int,
    eps: float, measure: bool, mean: int, variance: int, rstd: int, y: int, threads: int,
) -> None: ...  # fmt: skip
def norm_backward(
    element: int, grad: int, x: int, residual: int, output: int, channels: int, size: int, activation: int,
    weight: int, bias: int, mean: int, rstd: int, training: bool, grad_x: int, grad_residual: int, grad_weight: int,
    grad_bias: int, threads: int,
) -> None: ...  # fmt: skip
def reciprocal_deviation(variance: int, count: int, eps: float, rstd: int) -> None: ...
def update_running(running: int, measured: int, count: int, momentum: float, correction: float) -> None: ...

class PoolAxis:
    @overload
    def __init__(self, size: int, first: _Sizes, taps: int, step: int) -> None: ...
    @overload
    def __init__(self, size: int, first: _Sizes, end: _Sizes, scale: Sequence[float]) -> None: ...

def pool_forward(
    element: int, y: PoolAxis, x: PoolAxis, batch: int, channels: int, input: int, output: int, chosen: int,
    threads: int,
) -> None: ...  # fmt: skip
def pool_backward(
    element: int, y: PoolAxis, x: PoolAxis, batch: int, channels: int, grad: int, chosen: int, grad_input: int,
    threads: int,
) -> None: ...  # fmt: skip
def transpose(
    element: int, source: int, dest: int, batch: _Sizes, size: _Sizes, from_stride: _Sizes, to_stride: _Sizes,
    threads: int,
) -> None: ...  # fmt: skip
def dropout(
    element: int, x: int, y: int, size: int, seed: int, least_kept: int, scale: float, threads: int
) -> None: ...
def nth_magnitude(x: int, count: int, n: int, threads: int) -> float: ...
def mask_largest(x: int, count: int, keep: int, mask: int, threads: int) -> None: ...
def compact_bits(
    size: _Sizes, lanes: _Sizes, x: int, stride: _Sizes, threshold: float, bits: int, counts: int, threads: int
) -> None: ...
def compact_values(
    size: _Sizes, lanes: _Sizes, bits: int, start: int, x: int, stride: _Sizes, values: int, threads: int
) -> None: ...
def compact_expand(
    size: _Sizes, lanes: _Sizes, bits: int, start: int, values: int, x: int, stride: _Sizes, threads: int
) -> None: ...
def compact_gradient(
    conv: Convolution, size: _Sizes, lanes: _Sizes, bits: int, start: int, values: int, out_size: _Sizes, grad: int,
    grad_stride: _Sizes, weight_grad: int, threads: int,
) -> int: ...  # fmt: skip
def count_rows_above(
    weight: int, rows: int, cols: int, threshold: float, taps: int, tap_count: int, row_ptr: int, threads: int
) -> int: ...
def build_rows_above(
    conv: Convolution, weight: int, threshold: float, taps: int, row_ptr: int, col: int, values: int, t_row_ptr: int,
    t_col: int, perm: int, threads: int,
) -> None: ...  # fmt: skip
def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def activate_isa(name: str) -> bool: ...
def lanes() -> int: ...
def fma_peak(seconds: float) -> float: ...
def load_fma_peak(bytes: int, seconds: float) -> float: ...
