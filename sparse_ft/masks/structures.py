"""What is pruned together: single weights, N of M, blocks, filters or channels.

All structures see a weight in the layout (out, ..., in): a Linear is (out, in); a convolution is (out, kernel
positions, in), so that neighbours are input channels at one kernel position, as hardware and kernels that compute
with N:M and blocks read them; transformers' Conv1D, stored as (in, out), is transposed. In a grouped convolution the
input channels are those of one group.
"""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Structure:
    """A parsed structure name; `kind` is "unstructured", "n:m", "block", "filter" or "channel"."""

    kind: str
    first: int = 1  # N of N:M, rows (outputs) of a block
    second: int = 1  # M of N:M, columns (inputs) of a block

    @property
    def sparsity(self) -> float | None:
        """The sparsity that an N:M structure fixes; None for the others."""
        return 1 - self.first / self.second if self.kind == "n:m" else None


def parse_structure(text: str) -> Structure:
    """Structure of a name: "unstructured", "N:M" (N of M neighbouring inputs are kept), "block_AxB" (A outputs by B
    inputs), "filter" (an output channel or neuron) or "channel" (an input channel or feature).

    Raises:
        ValueError: Another name, N not in 1..M-1, or an empty block.
    """
    if text in ("unstructured", "filter", "channel"):
        return Structure(text)
    if match := re.fullmatch(r"(\d+):(\d+)", str(text)):
        kept, group = map(int, match.groups())
        if 0 < kept < group:
            return Structure("n:m", kept, group)
        raise ValueError(f"structure {text!r} must keep at least one and fewer than all weights of a group")
    if match := re.fullmatch(r"block_(\d+)x(\d+)", str(text)):
        rows, columns = map(int, match.groups())
        if rows and columns:
            return Structure("block", rows, columns)
    raise ValueError(
        f'unknown structure {text!r}; choose "unstructured", "N:M" such as "2:4", '
        '"block_AxB" such as "block_1x4", "filter" or "channel"'
    )


def to_canonical(weight: Tensor, transposed: bool) -> Tensor:
    """View of a weight as (out, ..., in); `transposed` for transformers' Conv1D."""
    return weight.t() if transposed else weight.movedim(1, -1)


def from_canonical(weight: Tensor, transposed: bool) -> Tensor:
    """Inverse of `to_canonical`."""
    return weight.t() if transposed else weight.movedim(-1, 1)


def keep_n_of_m(scores: Tensor, kept: int, group: int) -> Tensor:
    """Mask of the `kept` highest of every `group` neighbours along the last dimension; ties keep the later ones.

    A last group that is not full is treated as if padded with zeros: it keeps at most `kept` weights too.
    """
    length = scores.shape[-1]
    padded = F.pad(scores, (0, -length % group), value=-math.inf)
    groups = padded.unflatten(-1, (-1, group))
    # Padding counts as pruned first: it may tie with weights of score -inf, so it sorts by its place as well.
    is_weight = torch.arange(padded.shape[-1], device=scores.device).lt(length).view(-1, group).expand_as(groups)
    order = groups.argsort(dim=-1, stable=True)
    order = order.gather(-1, is_weight.gather(-1, order).to(torch.uint8).argsort(dim=-1, stable=True))
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., group - kept :], True)
    return mask.flatten(-2)[..., :length]


def group_scores(scores: Tensor, structure: Structure) -> tuple[Tensor, Tensor]:
    """Mean score and number of weights of every group of a "block", "filter" or "channel" structure.

    Args:
        scores: In the layout of `to_canonical`.

    Returns:
        Scores and sizes (int64), one-dimensional, in row-major order of the groups. The mean, not the sum, makes
        groups of different size comparable: edge blocks, and filters of different layers under a global budget.
    """
    sums, sizes = _pooled(scores, structure), _pooled(torch.ones_like(scores), structure)
    return (sums / sizes).flatten(), sizes.flatten().long()


def expand_groups(groups: Tensor, shape: torch.Size, structure: Structure) -> Tensor:
    """Mask of the weights from a mask of the groups in the order of `group_scores`; `shape` is canonical."""
    if structure.kind == "filter":
        return groups.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    if structure.kind == "channel":
        return groups.expand(shape)
    rows, columns = math.ceil(shape[0] / structure.first), math.ceil(shape[-1] / structure.second)
    blocks = groups.view(rows, *shape[1:-1], columns)
    blocks = blocks.repeat_interleave(structure.first, 0).repeat_interleave(structure.second, -1)
    return blocks[: shape[0], ..., : shape[-1]]


def _pooled(values: Tensor, structure: Structure) -> Tensor:
    if structure.kind == "filter":
        return values.flatten(1).sum(1)
    if structure.kind == "channel":
        return values.flatten(0, -2).sum(0)
    rows, columns = structure.first, structure.second
    padded = F.pad(values.movedim(0, -2), (0, -values.shape[-1] % columns, 0, -values.shape[0] % rows))
    return padded.unflatten(-1, (-1, columns)).sum(-1).movedim(-2, 0).unflatten(0, (-1, rows)).sum(1)


def n_of_m(mask: Tensor, *, transposed: bool = False) -> str | None:
    """ "N:M" if a mask keeps at most N, and nearly always N, of every M neighbouring inputs, N at most half of M.

    Groups of 4, 8 and 16 are tried. None for any other mask, also for one that keeps nothing.

    Args:
        mask: bool, of a weight's stored shape.
        transposed: for transformers' Conv1D.
    """
    for group in (4, 8, 16):
        rows = to_canonical(mask, transposed)
        if rows.shape[-1] % group:
            continue
        counts = rows.reshape(-1, group).sum(dim=1)
        kept = int(counts.max()) if len(counts) else 0
        if 0 < kept <= group // 2 and float(counts.double().mean()) > 0.95 * kept:
            return f"{kept}:{group}"
    return None
