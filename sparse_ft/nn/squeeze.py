"""Squeeze-and-excitation in batch-last layout: the mean over an image, and the gate that multiplies its channels.

torch sums over the positions of such a tensor, in the mean and in the gate's gradient, at a fraction of memory's
speed: in a training step of an EfficientNet that took as long as all its sparse weight gradients. The native pooling
is faster.
"""

from torch import Tensor, nn

from sparse_ft.nn.deferred import Deferred, result_of
from sparse_ft.nn.pooling import keeps_layout
from sparse_ft.nn.stock import adapts
from sparse_ft.ops.gradients import gate, image_sum


class _Squeezed:
    """An activation in the hands of a squeeze-and-excitation module. What it asks for beside the mean over each image
    and the product with a gate, it gets of the plain tensor."""

    def __init__(self, x: Tensor):
        self._x = x

    def mean(self, dim=None, keepdim: bool = False) -> Tensor:
        if dim in ((2, 3), [2, 3]) and keepdim:
            return image_sum(self._x) * (1.0 / (self._x.shape[2] * self._x.shape[3]))
        return self._x.mean(dim, keepdim=keepdim)

    def __mul__(self, other):
        x = self._x
        fits = isinstance(other, Tensor) and other.shape == (*x.shape[:2], 1, 1) and other.dtype == x.dtype
        return gate(x, other) if fits else x * other

    __rmul__ = __mul__

    def __getattr__(self, name: str):
        return getattr(self._x, name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args = tuple(arg._x if isinstance(arg, cls) else arg for arg in args)
        return function(*args, **(kwargs or {}))


@adapts("timm.layers", "SEModule", "EffectiveSEModule")
@adapts("timm.models._efficientnet_blocks", "SqueezeExcite")
class LayoutSqueeze(nn.Module):
    """timm's squeeze-and-excitation."""

    def forward(self, x: Tensor) -> Tensor:
        if type(x) is Deferred:
            x = result_of(x)
        return super().forward(_Squeezed(x) if type(x) is Tensor and keeps_layout(x) else x)
