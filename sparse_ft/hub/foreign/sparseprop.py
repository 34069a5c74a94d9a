"""State of sparseprop's layers: the values alone (``W_val``), in row-major order of the nonzeros.

Their positions are plain attributes of the module (sparseprop 0.1.14), so that a state dict lacks them: they are
taken from the nonzeros of the dense weight that the layer was made from.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_ft.hub.errors import ModelError

NAME = "sparseprop"
NO_POSITIONS = (
    "sparseprop's W_val are values without positions; give as reference the dense checkpoint, with its zeros, that "
    "the sparseprop model was made from"
)
_VALUES = "W_val"


def is_sparseprop(state_dict: Mapping[str, Tensor]) -> bool:
    return any(name.rpartition(".")[2] == _VALUES for name in state_dict)


def read(state_dict: Mapping[str, Tensor], reference: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The dense state dict.

    Args:
        reference: dense weights whose nonzeros are where the values belong.

    Raises:
        ModelError: The reference has no such weight, or another number of nonzeros.
    """
    dense: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        module, _, leaf = name.rpartition(".")
        if leaf != _VALUES:
            dense[name] = tensor
            continue
        weight = f"{module}.weight".lstrip(".")
        if weight not in reference:
            raise ModelError(f"{where}: the reference has no {weight}, which {name} are the values of")
        mask = reference[weight] != 0
        count = int(mask.sum())
        if tensor.dim() != 1 or len(tensor) != count:
            raise ModelError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, but {weight} of the reference has {count} "
                f"nonzeros: {NO_POSITIONS}"
            )
        dense[weight] = torch.zeros(reference[weight].shape, dtype=tensor.dtype)
        dense[weight][mask] = tensor
    return dense
