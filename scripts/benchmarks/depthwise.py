"""Depthwise convolutions with the batch norms on both sides of them: together, and in passes of their own."""

import torch
from torch import nn

from sparse_ft import ops
from sparse_ft.ops import Activation, gradients
from sparse_ft.ops.statistics import reciprocal_deviation
from sparse_ft.tune import interleaved_medians

from .case import Case, Settings

ROUNDS = 9
EPS = 1e-5
# channels, side of the input, stride: MobileNetV1's, at 224² (its five layers at 14² are alike)
LAYERS = [
    (32, 112, 1),
    (64, 112, 2),
    (128, 56, 1),
    (128, 56, 2),
    (256, 28, 1),
    (256, 28, 2),
    (512, 14, 1),
    (512, 14, 2),
]


def cases() -> list[Case]:
    return [Case("depthwise", lambda s: measure(LAYERS, 32, s))]


def measure(layers: list[tuple[int, int, int]], batch: int, settings: Settings) -> dict:
    """Milliseconds of norm, ReLU, 3x3 convolution and the next norm's statistics; and of the way back from there."""
    torch.set_num_threads(settings.threads)
    return {"batch": batch, "rows": [_measure(*layer, batch) for layer in layers]}


@torch.no_grad()
def _measure(channels: int, size: int, stride: int, batch: int) -> dict:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
    pattern, values = ops.SparsePattern.build(
        conv.weight, None, stride=conv.stride, padding=(1, 1), dilation=(1, 1), groups=channels
    )
    layer = (pattern.tensors, tuple(conv.weight.shape), conv.stride, (1, 1, 1, 1), (1, 1), channels)
    x = torch.ops.sparse_ft.to_layout(torch.randn(batch, channels, size, size), ops.BATCH_LAST)
    weight, bias, outer_weight, outer_bias = (torch.rand(channels) for _ in range(4))
    mean, variance = gradients.batch_norm_statistics(x)
    norm = (weight, bias, mean, reciprocal_deviation(variance, EPS))
    relu = Activation.RELU

    def forward_apart():
        activated = gradients.batch_norm(x, weight, bias, mean, variance, EPS, None, relu, True)[0]
        y = gradients.conv2d(activated, values, None, *layer)
        return activated, y, *gradients.batch_norm_statistics(y)

    def forward_together():
        return gradients.norm_depthwise(x, *norm, relu, True, values, None, *layer)

    activated, y, y_mean, y_variance = forward_apart()
    outer = (outer_weight, outer_bias, y_mean, reciprocal_deviation(y_variance, EPS))
    grad = torch.randn_like(y)

    def backward_apart():
        grad_y = gradients.batch_norm_backward(grad, y, *outer, None, None, relu, True)[0]
        value_grad = gradients.conv2d_weight_grad(grad_y, activated, *layer)
        through = gradients.conv2d_input_grad(grad_y, values, *layer, list(x.shape))
        return gradients.batch_norm_backward(through, x, *norm, None, None, relu, True), value_grad

    def backward_together():
        return gradients.norm_depthwise_backward(grad, y, *outer, relu, x, *norm, relu, True, values, *layer)

    runs = (forward_apart, forward_together, backward_apart, backward_together)
    medians = interleaved_medians({run.__name__: run for run in runs}, rounds=ROUNDS)
    stride_text = f", stride {stride}" if stride > 1 else ""
    return {"layer": f"{channels} channels, {size}²{stride_text}", **{k: v * 1e3 for k, v in medians.items()}}
