"""How many weights each layer keeps under SWAT, and which: tensor functions."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_ft.masks import budgets
from sparse_ft.ops.compact import largest_mask, nth_magnitude

_MOST = 0.99  # of a layer's weights under a budget by momentum


def momentum(means: Mapping[str, float], sizes: Mapping[str, int], keep: int) -> dict[str, int]:
    """Weights that each layer keeps, `keep` together, in proportion to the mean magnitude of its momentum.

    A layer gets 0.99 of its weights at most; what is left over is shared equally between the others.

    Args:
        means: mean absolute momentum of the active weights, by layer; all zero counts as all equal.
        sizes: weights of each layer.
    """
    total = sum(means.values())
    if not total > 0.0:
        means, total = dict.fromkeys(means, 1.0), float(len(means))
    limits = {name: max(1, int(_MOST * size)) for name, size in sizes.items()}
    wanted = {name: keep * mean / total for name, mean in means.items()}
    for _ in means:
        free = [name for name in means if wanted[name] < limits[name]]
        over = sum(max(0.0, wanted[name] - limits[name]) for name in means)
        if over <= 0 or not free:
            break
        wanted = {name: min(wanted[name], limits[name]) for name in means}
        for name in free:
            wanted[name] += over / len(free)
    # Rounded down, the rest to the layers whose fraction lost most.
    kept = {name: min(limits[name], int(wanted[name])) for name in means}
    by_loss = sorted(means, key=lambda name: kept[name] - wanted[name])
    for name in by_loss[: max(0, min(keep - sum(kept.values()), len(kept)))]:
        kept[name] = min(limits[name], kept[name] + 1)
    return kept


def erk(shapes: Mapping[str, torch.Size], sparsity: float) -> dict[str, int]:
    """Weights that each layer keeps under the Erdős-Rényi-Kernel rule."""
    zeros = budgets.erk(list(shapes.values()), sparsity)
    return {name: shape.numel() - count for (name, shape), count in zip(shapes.items(), zeros, strict=True)}


def uniform(shapes: Mapping[str, torch.Size], sparsity: float) -> dict[str, int]:
    """Weights that each layer keeps if all lose the same fraction."""
    return {name: shape.numel() - budgets.uniform(shape.numel(), sparsity) for name, shape in shapes.items()}


def magnitudes(weight: Tensor, structure: str) -> Tensor:
    """Of what is chosen together: of single weights, or summed over whole kernels or filters.

    Args:
        weight: (out, in) or (O, I/groups, KH, KW).
        structure: "unstructured"; "channel": kernels, by pair of output and input channel; "filter": output channels.
            Linear layers are unstructured under all three.
    """
    magnitude = weight.detach().abs()
    if structure == "unstructured" or weight.dim() == 2:
        return magnitude
    return magnitude.sum((2, 3) if structure == "channel" else (1, 2, 3), keepdim=True)


def active_mask(weight: Tensor, keep: int, structure: str) -> Tensor:
    """bool, True for the weights of largest magnitude, or for those of the whole kernels or filters that have it.

    Exactly `keep` weights, or the next whole number of kernels or filters; of equal ones the first.
    """
    found = magnitudes(weight, structure)
    groups = -(-keep // (weight.numel() // found.numel()))
    return _of_weights(largest_mask(found, groups), weight)


def smallest_kept(weight: Tensor, keep: int, structure: str) -> float:
    """The magnitude that the `keep` largest have at least, those that are zero apart; infinite if all are.

    Where fewer than `keep` weights are not zero, a threshold of zero would let in all that become so.
    """
    found = magnitudes(weight, structure)
    groups = -(-keep // (weight.numel() // found.numel()))
    smallest = nth_magnitude(found, groups - 1) if groups else math.inf
    if smallest > 0.0:
        return smallest
    found = found[found > 0]
    return float(found.min()) if found.numel() else math.inf


def at_least(weight: Tensor, threshold: float, structure: str) -> Tensor:
    """bool, True for the weights, or for those of the kernels or filters, whose magnitude reaches a threshold and is
    not zero."""
    found = magnitudes(weight, structure)
    return _of_weights((found >= threshold) & (found > 0), weight)


def _of_weights(mask: Tensor, weight: Tensor) -> Tensor:
    return mask.expand_as(weight).contiguous()
