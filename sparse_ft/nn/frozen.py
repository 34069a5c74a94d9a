"""Masks of pruned layers that stay dense.

A sparse layer cannot regrow, because it has no other weights. A pruned layer left dense (it would not be faster,
or it is of a kind without native form) is held to its mask here: its gradient is zero where it is pruned, from the
moment it is accumulated, so that clipping, momentum and adaptive scales see what the sparse layer would see.
"""

import torch
from torch import Tensor, nn

from sparse_ft.nn.module import SparseModule


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
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)

        return hook

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the weights outside the masks; call after `optimizer.step()`, for optimizers that move weights
        without a gradient."""
        for name, parameter in self._parameters.items():
            parameter.mul_(self.masks[name])

    def remove(self) -> None:
        """Let the weights go."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def freeze_masks(model: nn.Module, masks: dict[str, Tensor] | None = None) -> FrozenMasks:
    """Hold dense weights of `model` to their masks.

    Args:
        masks: parameter name ("layer1.0.conv1.weight") -> bool tensor of its shape, True where it is trained.
            None takes every parameter with two dimensions or more that has zeros. Names of parameters that the
            model does not hold in dense form (sparse layers) are passed over.

    Raises:
        ValueError: for a mask whose shape differs from its parameter's.
    """
    parameters = dict(model.named_parameters())
    if masks is None:
        masks = {
            name: parameter.detach() != 0
            for name, parameter in parameters.items()
            if parameter.dim() > 1 and not _belongs_to_sparse(model, name) and bool((parameter == 0).any())
        }
    held = {}
    for name, mask in masks.items():
        if name not in parameters or _belongs_to_sparse(model, name):
            continue
        if mask.shape != parameters[name].shape:
            raise ValueError(
                f"mask of {name} has shape {tuple(mask.shape)}, the parameter {tuple(parameters[name].shape)}"
            )
        held[name] = parameters[name]
    return FrozenMasks(held, {name: masks[name].to(held[name].device) for name in held})


def _belongs_to_sparse(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), SparseModule)
