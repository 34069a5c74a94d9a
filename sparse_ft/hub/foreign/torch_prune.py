"""State of `torch.nn.utils.prune`: ``weight_orig`` and ``weight_mask`` in place of ``weight``."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_ft.hub.errors import ModelError

NAME = "torch.nn.utils.prune"


def read(state_dict: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Pruned tensors under their own names, and the masks of the weights among them; None if nothing is pruned.

    A mask may keep a weight that is 0.0 at present; it stays in the mask.

    Raises:
        ModelError: One of the pair is missing, or it is no mask of that weight.
    """
    stems = {name.removesuffix("_orig") for name in state_dict if name.endswith("_orig")}
    stems |= {name.removesuffix("_mask") for name in state_dict if name.endswith("_mask")}
    pruned = {stem for stem in stems if f"{stem}_orig" in state_dict}
    if not pruned:
        return None
    dense: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        stem = name.removesuffix("_orig").removesuffix("_mask")
        if stem not in pruned or name == stem:
            dense[name] = tensor
        elif name.endswith("_orig"):
            mask = mask_of(state_dict, f"{stem}_mask", tensor, where)
            dense[stem] = torch.where(mask, tensor, torch.zeros((), dtype=tensor.dtype))
            if tensor.dim() > 1:
                masks[stem] = mask
    return dense, masks


def mask_of(state_dict: Mapping[str, Tensor], name: str, weight: Tensor, where: str) -> Tensor:
    """The bool mask that `state_dict` holds of a weight under `name`.

    Raises:
        ModelError: It is missing, of another shape, or holds other numbers than 0 and 1.
    """
    mask = state_dict.get(name)
    if mask is None:
        raise ModelError(f"{where}: {name} is missing")
    if mask.shape != weight.shape:
        raise ModelError(f"{where}: {name} has shape {tuple(mask.shape)}, its weight {tuple(weight.shape)}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ModelError(f"{where}: {name} is no mask: it holds other numbers than 0 and 1")
    return mask.bool()
