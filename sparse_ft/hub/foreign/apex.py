"""N:M masks of NVIDIA's ASP (apex.contrib.sparsity), which registers one beside each weight that it prunes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .torch_prune import mask_of

NAME = "N:M masks of ASP"
_SUFFIX = "_mma_mask"
_PRUNED = "_mma_pruned_p"  # with allow_recompute_mask, ASP keeps the pruned values as well


def read(state_dict: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Weights with the masks applied, and the masks; None if there are none.

    Raises:
        ModelError: A mask without its weight, or of another shape.
    """
    masks: dict[str, Tensor] = {}
    dense: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        module, _, leaf = name.rpartition(".")
        if not leaf.startswith("__") or not leaf.endswith((_SUFFIX, _PRUNED)):
            dense[name] = tensor
            continue
        if leaf.endswith(_SUFFIX):
            weight = f"{module}.{leaf.removeprefix('__').removesuffix(_SUFFIX)}".lstrip(".")
            masks[weight] = mask_of(state_dict, name, state_dict.get(weight, tensor[:0]), where)
    if not masks:
        return None
    for weight, mask in masks.items():
        dense[weight] = torch.where(mask, dense[weight], torch.zeros((), dtype=dense[weight].dtype))
    return dense, masks
