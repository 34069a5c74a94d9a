"""Distillation from a teacher."""

from ..base import Unsupported
from ..registry import register


@register("DistillationModifier")
class Distillation(Unsupported):
    """Learns from a teacher's outputs beside the labels."""

    source = "Hinton et al. 2015, arXiv 1503.02531"
    unsupported = "is not supported yet"
