"""How long a training is."""

from ..base import Scheduled
from ..registry import register


@register("EpochRangeModifier")
class EpochRange(Scheduled):
    """The training lasts at least until `end_epoch`."""

    source = "SparseML"
