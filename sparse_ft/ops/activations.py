"""The activations that a norm applies on its way out."""

import enum
import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(enum.IntEnum):
    """In the order of csrc/api.h."""

    IDENTITY = 0
    RELU = 1
    RELU6 = 2
    SILU = 3
    HARDSWISH = 4
    GELU = 5
    GELU_TANH = 6

    @property
    def cheap(self) -> bool:
        """Whether computing it again costs less than keeping it in memory."""
        return self <= Activation.RELU6 or self == Activation.HARDSWISH

    @property
    def slope_from_output(self) -> bool:
        """Whether the output alone tells the slope, so that nothing else need be kept for it."""
        return self <= Activation.RELU6


def activate(v: Tensor, activation: int) -> Tensor:
    """The reference form: torch's own function of a pre-activation."""
    match Activation(activation):
        case Activation.IDENTITY:
            return v
        case Activation.RELU:
            return v.relu()
        case Activation.RELU6:
            return v.clamp(0, 6)
        case Activation.SILU:
            return F.silu(v)
        case Activation.HARDSWISH:
            return F.hardswish(v)
        case Activation.GELU:
            return F.gelu(v)
        case Activation.GELU_TANH:
            return F.gelu(v, approximate="tanh")


def slope(v: Tensor, activation: int) -> Tensor:
    """Its derivative at `v`; the output will do for `v` where `slope_from_output` says so."""
    match Activation(activation):
        case Activation.IDENTITY:
            return torch.ones_like(v)
        case Activation.RELU:
            return (~(v <= 0)).to(v.dtype)  # as torch: that of NaN is one
        case Activation.RELU6:
            return (~((v <= 0) | (v >= 6))).to(v.dtype)
        case Activation.SILU:
            s = v.sigmoid()
            return s + v * s * (1 - s)
        case Activation.HARDSWISH:
            return torch.where(v >= 3, 1.0, torch.where(v <= -3, 0.0, v / 3 + 0.5)).to(v.dtype)
        case Activation.GELU:
            return torch.special.ndtr(v) + v * torch.exp(-v * v / 2) / math.sqrt(2 * math.pi)
        case Activation.GELU_TANH:
            scale = 2 * math.sqrt(2 / math.pi)
            s = (scale * v * (1 + 0.044715 * v * v)).sigmoid()
            return s + v * s * (1 - s) * scale * (1 + 3 * 0.044715 * v * v)
