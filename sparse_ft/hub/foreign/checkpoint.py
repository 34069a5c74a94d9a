"""A checkpoint file of any format that is known, in one form."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from sparse_ft.hub.errors import ModelError

from . import apex, sparseml, sparseprop, torch_prune
from .files import read_file
from .names import strip_wrappers


@dataclass
class Checkpoint:
    """A dense state dict, and what the file says beside it.

    Attributes:
        state_dict: dense tensors by name; pruned places are 0.0.
        masks: by weight name, where the file has masks of its own: True at the places that are trained.
        formats: what was found in the file, in words.
        recipe: text of a SparseML recipe in the file.
    """

    state_dict: dict[str, Tensor]
    masks: dict[str, Tensor] = field(default_factory=dict)
    formats: list[str] = field(default_factory=list)
    recipe: str | None = None


def read_checkpoint(
    path: str | Path, reference_weights: Callable[[], Mapping[str, Tensor]] | None = None
) -> Checkpoint:
    """Read a checkpoint file, whatever tool wrote it, without running code from it.

    Known are plain state dicts (also under ``state_dict``, ``model`` and the like, with the prefixes of
    DataParallel and torch.compile), `torch.nn.utils.prune` (``weight_orig``, ``weight_mask``), N:M masks of NVIDIA's
    ASP, SparseML's ``.pth`` and sparseprop's.

    Args:
        path: ``.safetensors``, its ``.index.json`` of shards, or a pickle (``.pth``, ``.pt``, ``.bin`` and others).
        reference_weights: gives the dense weights that a sparseprop model was made from, whose nonzeros are where
            its values belong: that tool does not save positions.

    Raises:
        ModelError: The file is damaged, holds something else than tensors, or contradicts itself.
    """
    path = Path(path)
    content = read_file(path)
    checkpoint = Checkpoint(strip_wrappers(content.state_dict))
    for tool in (torch_prune, apex, sparseml):
        found = tool.read(checkpoint.state_dict, str(path))
        if found is not None:
            checkpoint.state_dict, masks = found
            checkpoint.masks |= masks
            checkpoint.formats.append(tool.NAME)
    if sparseprop.is_sparseprop(checkpoint.state_dict):
        if reference_weights is None:
            raise ModelError(f"{path}: {sparseprop.NO_POSITIONS}")
        checkpoint.state_dict = sparseprop.read(checkpoint.state_dict, reference_weights(), str(path))
        checkpoint.formats.append(sparseprop.NAME)
    checkpoint.recipe = content.recipe
    return checkpoint
