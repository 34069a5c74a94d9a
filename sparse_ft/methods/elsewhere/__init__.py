"""Modifiers of SparseML and llm-compressor that recipes contain and that have no place here."""

from typing import Any

from ..base import Modifier, Unsupported
from ..fields import ANYTHING, EPOCH, FLAG, NEVER, field, integer, number
from ..pruning import GradualPruning
from ..registry import register


@register("SparseGPTModifier")
class SparseGPT(Unsupported):
    """One-shot pruning of large language models, layer by layer, with a second-order update."""

    source = "Frantar & Alistarh 2023, arXiv 2301.00774"
    unsupported = "is not supported here: prune with `sparse_ft.prune` or OBSPruningModifier"


@register("WandaPruningModifier")
class Wanda(Unsupported):
    """One-shot pruning of large language models by weight and activation."""

    source = "Sun et al. 2023, arXiv 2306.11695"
    unsupported = SparseGPT.unsupported


@register("MFACPruningModifier")
class MFAC(GradualPruning):
    """Second-order pruning by matrix-free approximate curvature."""

    source = "Frantar et al. 2021, arXiv 2107.03356"
    unsupported = "is not supported here: OBSPruningModifier is the second-order method"
    global_sparsity: bool = field(FLAG, False, doc="One budget for all weights together.")
    use_gradient_buffering: Any = field(ANYTHING, None, doc="Of the method's gradients.")
    num_grads: Any = field(ANYTHING, 64, doc="How many gradients.")
    damp: float = field(number(0), 1e-5, doc="Damping of the Fisher information.")
    grads_device: Any = field(ANYTHING, "cpu", doc="Where the gradients lie.")
    fisher_block_size: int = field(integer(1), 2000, doc="Size of its blocks.")
    num_pages: int = field(integer(1), 1, doc="Of its blocks.")
    available_devices: Any = field(ANYTHING, None, doc="Devices to compute on.")
    grad_sampler_kwargs: Any = field(ANYTHING, None, doc="Of the sampler of gradients.")


@register("PowerpropagationModifier")
class Powerpropagation(Unsupported):
    """Trains weights in a form in which small ones stay small."""

    source = "Schwarz et al. 2021, arXiv 2110.00296"
    unsupported = "is not supported here"


@register("LayerPruningModifier")
class LayerPruning(Unsupported):
    """Replaces whole layers by the identity."""

    source = "SparseML"
    unsupported = "is not supported here: a model of fewer layers can be made before training"


@register("LayerThinningModifier")
class LayerThinning(Unsupported):
    """Removes pruned filters from the model."""

    source = "SparseML"
    unsupported = "is not supported here: pruned filters stay in the model, as zeros"


@register("OutputDistillationModifier")
class OutputDistillation(Unsupported):
    """Distillation of intermediate outputs of language models."""

    source = "SparseML"
    unsupported = "is not supported here: DistillationModifier and PerLayerDistillationModifier are"


@register("SparsificationLoggingModifier")
class SparsificationLogging(Modifier):
    """Without effect: sparsity is logged at every update in any case."""

    source = "SparseML"
    start_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="Without effect.")
    end_epoch: float = field(EPOCH, NEVER, unit="epochs", doc="Without effect.")
    update_frequency: float = field(number(), 1.0, unit="epochs", doc="Without effect.")
