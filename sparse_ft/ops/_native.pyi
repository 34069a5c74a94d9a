"""The native core (csrc/bindings.cpp): ValueError for malformed patterns.

Layers (csrc/products.cpp, csrc/norms.cpp) take tensors and give new ones, or None, having done nothing, where they do
not take their arguments as they are. The rest takes addresses and sizes; `element` is what activations are stored as:
0 for float32, 1 for bfloat16.
"""

from collections.abc import Sequence
from typing import overload

from torch import Tensor

_Sizes = Sequence[int]
_Tensors = tuple[Tensor, Tensor, Tensor]
_Pattern = Sequence[Tensor]
_Norm = tuple  # weight, bias, mean, rstd, activation

class Convolution:
    def __init__(self, weight: _Sizes, stride: _Sizes, padding: _Sizes, dilation: _Sizes, groups: int) -> None: ...

class Programs:
    def __init__(self) -> None: ...

def block(element: int, shape: _Sizes, strides: _Sizes) -> Tensor: ...
def keep_blocks(keep: bool) -> bool: ...
def release_blocks() -> int: ...
def ask_for_huge_heap(bytes: int) -> None: ...
def threads(operations: int, values: int, most: int) -> int: ...
def untransformed() -> bool: ...
def unwatched(*args: object) -> bool: ...
def versions_of(*tensors: Tensor | None) -> bytes: ...
def state_of(tensors: Sequence[Tensor]) -> bytes | None: ...
def conv2d(
    conv: Convolution, x: Tensor, values: Tensor, bias: Tensor | None, pattern: _Pattern, programs: Programs | None,
    threads: int, norm: tuple | None, result: tuple | None, measure: bool, out: Tensor | None,
) -> Tensor | tuple[Tensor, Tensor | None, Tensor | None] | None: ...  # fmt: skip
def conv2d_input_grad(
    conv: Convolution, grad: Tensor, values: Tensor, pattern: _Pattern, programs: Programs | None, threads: int,
    input_shape: _Sizes, out: Tensor | None,
) -> Tensor | None: ...  # fmt: skip
def conv2d_weight_grad(
    conv: Convolution, grad: Tensor, x: Tensor, pattern: _Pattern, programs: Programs | None, threads: int,
    norm: tuple | None, out: Tensor | None,
) -> Tensor | None: ...  # fmt: skip
def conv2d_backward(
    conv: Convolution, grad: Tensor, x: Tensor, values: Tensor, pattern: _Pattern, programs: Programs | None,
    threads: int, norm: tuple | None,
) -> tuple[Tensor, Tensor] | None: ...  # fmt: skip
def linear(
    conv: Convolution, x: Tensor, values: Tensor, bias: Tensor | None, pattern: _Pattern, programs: Programs | None,
    threads: int,
) -> Tensor | None: ...  # fmt: skip
def linear_input_grad(
    conv: Convolution, grad: Tensor, values: Tensor, pattern: _Pattern, programs: Programs | None, threads: int
) -> Tensor | None: ...
def linear_weight_grad(
    conv: Convolution, grad: Tensor, x: Tensor, pattern: _Pattern, programs: Programs | None, threads: int,
    of_bias: bool,
) -> Tensor | tuple[Tensor, Tensor] | None: ...  # fmt: skip
def takes_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None) -> bool: ...
def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, variance: Tensor | None, eps: float,
    residual: Tensor | None, activation: int, threads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None: ...  # fmt: skip
def batch_norm_statistics(x: Tensor, threads: int) -> tuple[Tensor, Tensor] | None: ...
def batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor,
    residual: Tensor | None, output: Tensor | None, activation: int, training: bool, threads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None: ...  # fmt: skip
def norm_depthwise(
    conv: Convolution, x: Tensor, inner: _Norm, values: Tensor, bias: Tensor | None, pattern: _Pattern, threads: int
) -> _Tensors | None: ...
def norm_depthwise_backward(
    conv: Convolution, grad: Tensor, y: Tensor, outer: _Norm, x: Tensor, inner: _Norm, training: bool, values: Tensor,
    pattern: _Pattern, threads: int,
) -> tuple[Tensor, ...] | None: ...  # fmt: skip
def norm_max_pool(
    x: Tensor, norm: _Norm, rows: PoolAxis, columns: PoolAxis, chosen: Tensor, threads: int
) -> Tensor | None: ...
def norm_max_pool_backward(
    grad: Tensor, chosen: Tensor, x: Tensor, norm: _Norm, training: bool, rows: PoolAxis, columns: PoolAxis,
    threads: int,
) -> _Tensors | None: ...  # fmt: skip
def reciprocal_deviation(variance: Tensor, eps: float) -> Tensor | None: ...
def update_running(
    batches: Tensor,
    running_mean: Tensor,
    running_variance: Tensor,
    mean: Tensor,
    variance: Tensor,
    momentum: float | None,
    correction: float,
) -> bool: ...
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
