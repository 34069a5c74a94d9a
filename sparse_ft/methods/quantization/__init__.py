"""Quantization is no part of this project; recipes that contain it are read all the same."""

from ..base import Unsupported
from ..registry import register

_REASON = (
    "quantization is not supported here: leave the modifier out (`ignore_unknown` passes it over with a warning), "
    "and quantize the trained model afterwards with the tools of its deployment"
)


class _Quantization(Unsupported):
    """Quantization-aware training or post-training quantization."""

    source = "SparseML"
    unsupported = _REASON


@register("QuantizationModifier")
class Quantization(_Quantization):
    """Quantization-aware training or post-training quantization."""


@register("LegacyQuantizationModifier")
class LegacyQuantization(_Quantization):
    """Quantization-aware training in SparseML's older form."""


@register("GPTQModifier")
class GPTQ(_Quantization):
    """Post-training quantization by second-order error."""

    source = "Frantar et al. 2022, arXiv 2210.17323"


@register("SmoothQuantModifier")
class SmoothQuant(_Quantization):
    """Moves the scale of activations into weights before quantization."""

    source = "Xiao et al. 2022, arXiv 2211.10438"
