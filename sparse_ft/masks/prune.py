"""One-shot pruning, and the one place that turns scores into masks."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparse_ft.nn import SparseModule, is_transformers_conv1d

from . import budgets
from .budgets import SCOPES, check_sparsity
from .names import PATTERN_PREFIX, match_names
from .scores import Score, compute_score
from .sparsity import SparsityReport, report
from .structures import (
    Structure,
    expand_groups,
    from_canonical,
    group_scores,
    keep_n_of_m,
    parse_structure,
    to_canonical,
)
from .targets import AUTO, prunable_layers, typed_layers

DEFAULT_SPARSITY = 0.95


def prune(
    model: nn.Module,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    scope: str = "uniform",
    score: Score = "magnitude",
    structure: str = "unstructured",
    ignore: str | Sequence[str] = AUTO,
) -> SparsityReport:
    """Set the least important weights of a model to zero, in place, in one shot.

    Weights that are zero already are the first to go, so pruning again to a higher sparsity only adds zeros. Zeros
    are never brought back: a layer that is sparser than asked stays as it is. Nothing is changed if an error is
    raised.

    Args:
        model: Any module; `state_dict` keys and shapes stay.
        sparsity: Fraction of zeros in [0, 1) over the pruned layers, 0.95 by default. With an N:M structure it is
            fixed at 1 - N/M and is best left out. A mapping from layer names or `"re:<pattern>"` to fractions
            prunes only those layers, each to its own sparsity, under scope "uniform"; a name goes before a pattern
            and an earlier pattern before a later one, and a layer named exactly is pruned even if `"auto"` leaves
            it dense.
        scope: "uniform" (every layer gets the sparsity), "erk" (more for larger layers: Erdős-Rényi-Kernel,
            Evci et al. 2020) or "global" (the lowest scores of all layers together).
        score: "magnitude", or a callable `(layer name, module) -> Tensor` of the weight's shape; the lowest go.
            Ties go in the order of the layers and of the weight's elements.
        structure: "unstructured", "N:M", "block_AxB", "filter" or "channel", see `sparse_ft.masks.structures`.
        ignore: Layers to leave dense, see `prunable_layers`.

    Returns:
        The sparsity of every layer afterwards.

    Raises:
        ValueError: A sparsity outside [0, 1), an unknown name, no layer to prune, or native sparse layers among
            those to prune.
    """
    targets = prunable_layers(model, ignore)
    layers: dict[str, nn.Module] = dict(targets)
    if isinstance(sparsity, Mapping):
        if scope != "uniform":
            raise ValueError(f'a sparsity per layer goes with scope="uniform", not {scope!r}')
        sparsity = _per_layer(sparsity, layers, typed_layers(model))
        layers = {name: layer for name, layer in typed_layers(model).items() if name in sparsity}
    if not layers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(targets.skipped.items())[:3])
        raise ValueError(f"no layer to prune{f' ({reasons})' if reasons else ''}; pass ignore=[] to prune every layer")
    masks = compute_masks(layers, sparsity, scope=scope, score=score, structure=structure)
    with torch.no_grad():
        for name, mask in masks.items():
            weight = layers[name].weight
            assert isinstance(weight, Tensor)
            # Not a product: 0 * inf is NaN, and 0 * -1 is a negative zero.
            weight.masked_fill_(~mask, 0.0)
    return report(model, {name: reason for name, reason in targets.skipped.items() if name not in layers})


def compute_masks(
    layers: Mapping[str, nn.Module],
    sparsity: float | Mapping[str, float] | None = None,
    *,
    scope: str = "uniform",
    score: Score = "magnitude",
    structure: str = "unstructured",
) -> dict[str, Tensor]:
    """Masks that `prune` would apply, by layer name: True for the weights that stay.

    Args:
        layers: Dense layers by name, such as `prunable_layers` returns.
        sparsity: One fraction, or one for every layer of `layers` by its name.

    Raises:
        ValueError: As `prune`.
    """
    form = parse_structure(structure)
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; choose from {', '.join(SCOPES)}")
    wanted = _check_sparsities(layers, sparsity, form, structure)
    native = [name for name, layer in layers.items() if isinstance(layer, SparseModule)]
    if native:
        raise ValueError(
            f"layer {native[0]!r} is a native sparse layer, whose pattern is fixed: "
            "call sparse_ft.to_dense(model) first"
        )

    return masks_from_scores(
        {name: compute_score(score, name, layer) for name, layer in layers.items()},
        wanted,
        scope=scope,
        structure=structure,
        pruned={name: _weight(layer) == 0 for name, layer in layers.items()},
        transposed={name for name, layer in layers.items() if is_transformers_conv1d(layer)},
    )


def masks_from_scores(
    scores: Mapping[str, Tensor],
    sparsity: Mapping[str, float],
    *,
    scope: str = "uniform",
    structure: str = "unstructured",
    pruned: Mapping[str, Tensor] | None = None,
    transposed: Collection[str] = (),
) -> dict[str, Tensor]:
    """Masks of weights from their scores: True for those that stay.

    Args:
        scores: By name, of each weight's shape; the lowest go, ties in their order.
        sparsity: Fraction of zeros by name; the scopes "erk" and "global" take the first as that of all together.
        scope: "uniform", "erk" or "global", see `prune`.
        structure: See `sparse_ft.masks.structures`; an N:M structure has its own sparsity.
        pruned: By name, True for weights that go before all others.
        transposed: Names of weights that are stored as (in, out).

    Raises:
        ValueError: An unknown structure, or one that a one-dimensional parameter cannot have.
    """
    form = parse_structure(structure)
    if pruned is not None and form.kind in ("unstructured", "n:m"):
        scores = {name: values.masked_fill(pruned[name], -torch.inf) for name, values in scores.items()}
    canonical: dict[str, Tensor] = {}
    for name, values in scores.items() if form.kind != "unstructured" else ():
        if values.ndim < 2:
            raise ValueError(f"{name} has one dimension: structure {structure!r} is one of matrices and filters")
        canonical[name] = to_canonical(values, name in transposed)
    if form.kind == "n:m":
        return {
            name: from_canonical(keep_n_of_m(values, form.first, form.second), name in transposed)
            for name, values in canonical.items()
        }

    pools: dict[str, Tensor] = {}
    sizes: dict[str, Tensor | None] = {}
    for name, values in scores.items():
        if form.kind == "unstructured":
            pools[name], sizes[name] = values.flatten(), None
        else:
            pools[name], sizes[name] = group_scores(canonical[name], form)
            if pruned is not None:
                zeros, _ = group_scores(to_canonical(pruned[name].float(), name in transposed), form)
                pools[name] = pools[name].masked_fill(zeros == 1.0, -torch.inf)
    keep = _keep({name: values.shape for name, values in scores.items()}, pools, sizes, sparsity, scope)
    if form.kind == "unstructured":
        return {name: mask.view(scores[name].shape) for name, mask in keep.items()}
    return {
        name: from_canonical(expand_groups(mask, canonical[name].shape, form), name in transposed)
        for name, mask in keep.items()
    }


def _keep(
    shapes: Mapping[str, torch.Size],
    pools: Mapping[str, Tensor],
    sizes: Mapping[str, Tensor | None],
    wanted: Mapping[str, float],
    scope: str,
) -> dict[str, Tensor]:
    if scope == "global":
        sparsity = next(iter(wanted.values()))
        zeros = round(sum(shape.numel() for shape in shapes.values()) * sparsity)
        counts = [size for size in sizes.values() if size is not None]
        pooled = keep_highest(torch.cat(list(pools.values())), zeros, torch.cat(counts) if counts else None)
        return dict(zip(pools, pooled.split([len(pool) for pool in pools.values()]), strict=True))
    if scope == "erk":
        budget = budgets.erk(list(shapes.values()), next(iter(wanted.values())))
    else:
        budget = [budgets.uniform(shape.numel(), wanted[name]) for name, shape in shapes.items()]
    return {name: keep_highest(pools[name], zeros, sizes[name]) for name, zeros in zip(shapes, budget, strict=True)}


def keep_highest(scores: Tensor, zeros: int, sizes: Tensor | None = None) -> Tensor:
    """Mask of all scores but the lowest that make up `zeros` weights; among equal scores the first go.

    Args:
        scores: One-dimensional, without NaN.
        zeros: Weights to prune.
        sizes: Weights that each score stands for, 1 if None. Then the count is the one nearest to `zeros` that whole
            groups in the order of their scores can make.
    """
    mask = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    if zeros <= 0:
        return mask
    if sizes is not None:
        order = scores.argsort(stable=True)
        ends = sizes[order].cumsum(0)
        # A group goes if more than half of it is within the budget.
        mask[order[ends - sizes[order] / 2 < zeros]] = False
        return mask
    threshold = scores.kthvalue(zeros).values
    mask[scores < threshold] = False
    ties = torch.nonzero(scores == threshold).flatten()
    mask[ties[: zeros - int((~mask).sum())]] = False
    return mask


def _per_layer(
    sparsity: Mapping[str, float], layers: Mapping[str, nn.Module], all_layers: Mapping[str, nn.Module]
) -> dict[str, float]:
    exact = [entry for entry in sparsity if not entry.startswith(PATTERN_PREFIX)]
    patterns = [entry for entry in sparsity if entry.startswith(PATTERN_PREFIX)]
    chosen: dict[str, float] = {}
    for entries, names in ((exact, list(all_layers)), (patterns, list(layers))):
        for entry, found in match_names(entries, names).items():
            for name in found:
                chosen.setdefault(name, check_sparsity(sparsity[entry], f"sparsity of {entry!r}"))
    return chosen


def _check_sparsities(
    layers: Mapping[str, nn.Module], sparsity: float | Mapping[str, float] | None, form: Structure, structure: str
) -> dict[str, float]:
    if sparsity is None:
        sparsity = DEFAULT_SPARSITY if form.sparsity is None else form.sparsity
    if isinstance(sparsity, Mapping):
        wanted = {name: check_sparsity(sparsity[name], f"sparsity of layer {name!r}") for name in layers}
    else:
        wanted = dict.fromkeys(layers, check_sparsity(sparsity))
    for value in wanted.values():
        if form.sparsity is not None and abs(value - form.sparsity) > 0.01:
            raise ValueError(
                f"structure {structure!r} fixes the sparsity at {form.sparsity:.4g}, not {value}: leave sparsity out"
            )
    return wanted


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
