"""Masks of pruned layers that stay dense.

A sparse layer cannot regrow, because it has no other weights. A pruned layer left dense (it would not be faster,
or it is of a kind without native form) is held to its mask here: its gradient is zero where it is pruned, from the
moment it is accumulated, so that clipping, momentum and adaptive scales see what the sparse layer would see.
"""

import torch
from torch import Tensor, nn

from sparse_ft.nn.linear import is_transformers_conv1d
from sparse_ft.nn.module import SparseModule

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class FrozenMasks:
    """Handle of `freeze_masks`: `masks` by parameter name, `apply()`, `remove()`."""

    def __init__(self, parameters: dict[str, nn.Parameter], masks: dict[str, Tensor]):
        self.masks = masks
        self._parameters = parameters
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._mask_gradient(masks[name]))
            for name, parameter in parameters.items()
            if parameter.requires_grad
        ]

    @staticmethod
    def _mask_gradient(mask: Tensor):
        pruned = ~mask

        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(pruned, 0.0)  # not a product: 0 * inf is NaN

        return hook

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the weights outside the masks; call after `optimizer.step()`, for optimizers that move weights
        without a gradient."""
        for name, parameter in self._parameters.items():
            parameter.masked_fill_(~self.masks[name], 0.0)

    def remove(self) -> None:
        """Let the weights go."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def freeze_masks(model: nn.Module, masks: dict[str, Tensor] | None = None) -> FrozenMasks:
    """Hold dense weights of `model` to their masks.

    Args:
        masks: parameter name ("layer1.0.conv1.weight") -> bool tensor of its shape, True where it is trained.
            None takes the weight of every linear and convolution layer that has zeros, but is not all zeros, as
            new layers (an adapter's second matrix, some classifiers) are before they learn. Names of parameters
            that the model does not hold in dense form (sparse layers) are passed over.

    Raises:
        ValueError: for a mask whose shape differs from its parameter's.
    """
    parameters = dict(model.named_parameters())
    held, bools = {}, {}
    for name, mask in (_masks_of_zeros(model) if masks is None else masks).items():
        if name not in parameters or _belongs_to_sparse(model, name):
            continue
        if mask.shape != parameters[name].shape:
            raise ValueError(
                f"mask of {name} has shape {tuple(mask.shape)}, the parameter {tuple(parameters[name].shape)}"
            )
        held[name] = parameters[name]
        bools[name] = mask.to(parameters[name].device, torch.bool)
    return FrozenMasks(held, bools)


def _masks_of_zeros(model: nn.Module) -> dict[str, Tensor]:
    masks = {}
    for name, layer in model.named_modules():
        weight = layer._parameters.get("weight")
        if weight is not None and (isinstance(layer, _KINDS) or is_transformers_conv1d(layer)):
            mask = weight.detach() != 0
            if mask.any() and not mask.all():
                masks[f"{name}.weight".lstrip(".")] = mask
    return masks


def _belongs_to_sparse(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), SparseModule)
