"""Pooling that keeps batch-last layout. torch's own copies such an activation, and its gradient once more."""

import functools

import torch
from torch import Tensor, nn

from sparse_ft.nn.deferred import Deferred, take_alone
from sparse_ft.nn.stock import adapts
from sparse_ft.ops import BATCH_LAST, CHANNELS_LAST, is_batch_last, native_reason
from sparse_ft.ops.gradients import avg_pool2d, max_pool2d, norm_max_pool2d, to_layout

_LEAST_BATCH = 4  # lanes are samples: with fewer of them torch's own is faster, copies and all
_LARGE = 2**16
_MOST_TAPS = 255


def keeps_layout(x: Tensor) -> bool:
    """Whether the native pooling is to take `x`, which is batch-last."""
    return (
        x.dim() == 4
        and x.shape[0] >= _LEAST_BATCH
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and is_batch_last(x)
        and native_reason(x) is None
    )


def _few_samples(x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.dim() == 4
        and 0 < x.shape[0] < _LEAST_BATCH
        and x.numel() >= _LARGE
        and is_batch_last(x)
        and native_reason(x) is None
    )


def _pair(value) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)  # type: ignore[return-value]


def _starts(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> tuple[int, ...] | None:
    """Where the windows begin; None for numbers that torch may refuse."""
    if padding < 0 or 2 * padding > kernel:
        return None
    reach = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (reach + (stride - 1 if ceil else 0)) // stride + 1
    if ceil and (count - 1) * stride >= size + padding:  # one that would begin in the padding behind
        count -= 1
    return tuple(range(-padding, count * stride - padding, stride)) if count > 0 else None


@functools.lru_cache(maxsize=4096)
def _max_windows(size, kernel, stride, padding, dilation, ceil):
    starts = [_starts(*axis, ceil) for axis in zip(size, kernel, stride, padding, dilation, strict=True)]
    if kernel[0] * kernel[1] > _MOST_TAPS:
        return None
    for begins, length, taps, step in zip(starts, size, kernel, dilation, strict=True):
        # Taps far apart may straddle the whole input.
        if begins is None or not all(any(0 <= s + t * step < length for t in range(taps)) for s in begins):
            return None
    return (*starts, kernel, dilation)


def _average_axis(size, kernel, stride, padding, ceil, count_padding):
    starts = _starts(size, kernel, stride, padding, 1, ceil)
    if starts is None:
        return None
    begin, end = (tuple(min(max(s + reach, 0), size) for s in starts) for reach in (0, kernel))
    inside = [e - b for b, e in zip(begin, end, strict=True)]
    padded = [min(s + kernel, size + padding) - s for s in starts]
    return begin, end, padded if count_padding else inside


@functools.lru_cache(maxsize=4096)
def _average_windows(size, kernel, stride, padding, ceil, count_padding, divisor):
    windows: list[tuple] = []
    for axis in zip(size, kernel, stride, padding, strict=True):
        found = _average_axis(*axis, ceil, count_padding)
        if found is None:
            return None
        begin, end, counts = found
        scale = tuple(1.0 / count if count else 0.0 for count in counts)
        if divisor is not None:
            scale = tuple(1.0 / divisor if not windows else 1.0 for _ in begin)
        windows.extend((begin, end, scale))
    return tuple(windows)


@functools.lru_cache(maxsize=4096)
def _adaptive_windows(size, output):
    windows: list[tuple] = []
    for have, want in zip(size, output, strict=True):
        begin = tuple(i * have // want for i in range(want))
        end = tuple(-(-(i + 1) * have // want) for i in range(want))
        windows.extend((begin, end, tuple(1.0 / (e - b) for b, e in zip(begin, end, strict=True))))
    return tuple(windows)


@adapts("torch.nn", "MaxPool2d")
class LayoutMaxPool(nn.MaxPool2d):
    """torch's maximum pooling. In training it takes an activated norm unfinished, which then is not stored."""

    def forward(self, x: Tensor):
        windows = None
        if not self.return_indices and keeps_layout(x):
            windows = _max_windows(
                tuple(x.shape[2:]), _pair(self.kernel_size), _pair(self.stride), _pair(self.padding),
                _pair(self.dilation), self.ceil_mode,
            )  # fmt: skip
        if windows is not None:
            if type(x) is Deferred:
                norm, x = take_alone(x)
                if norm is not None:
                    return norm_max_pool2d(*norm.operands(), norm.training, *windows)[0]
            return max_pool2d(x, *windows)[0]
        if _few_samples(x) and not self.return_indices:
            # torch's own takes ten times as long in batch-last layout, which is contiguous for a single sample.
            return to_layout(super().forward(to_layout(x, CHANNELS_LAST)), BATCH_LAST)
        return super().forward(x)


@adapts("torch.nn", "AvgPool2d")
class LayoutAvgPool(nn.AvgPool2d):
    """torch's average pooling."""

    def forward(self, x: Tensor) -> Tensor:
        windows = None
        if keeps_layout(x) and self.divisor_override != 0:
            windows = _average_windows(
                tuple(x.shape[2:]), _pair(self.kernel_size), _pair(self.stride), _pair(self.padding), self.ceil_mode,
                self.count_include_pad, self.divisor_override,
            )  # fmt: skip
        return super().forward(x) if windows is None else avg_pool2d(x, *windows)


@adapts("torch.nn", "AdaptiveAvgPool2d")
class LayoutAdaptiveAvgPool(nn.AdaptiveAvgPool2d):
    """torch's adaptive average pooling."""

    def forward(self, x: Tensor) -> Tensor:
        wanted = (self.output_size,) * 2 if isinstance(self.output_size, int) else self.output_size
        if not keeps_layout(x) or wanted is None or min(1 if size is None else size for size in wanted) < 1:
            return super().forward(x)
        output = tuple(have if want is None else want for have, want in zip(x.shape[2:], wanted, strict=True))
        return avg_pool2d(x, *_adaptive_windows(tuple(x.shape[2:]), output))
