"""Optimal Brain Surgeon: weights go that cost least by the second-order loss, and the others make up for them."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..fields import FLAG, MAPPING, Field, FieldError, field, integer, number, read_fields
from ..pruning import GradualPruning
from ..registry import register
from ..targets import zero_fraction
from ..training import Training

_SAMPLER: dict[str, Field] = {"batch_size": field(integer(1), 0, doc="Examples of a gradient.")}


@register("OBSPruningModifier")
class OBSPruning(GradualPruning):
    """Gradual second-order pruning (oBERT): scores and steps of the weights from a block-wise Fisher matrix.

    At each update gradients of fresh batches are sampled (a `grad_sampler` of the session; SparseTrainer has one).
    The inverse Fisher matrix of each block of consecutive weights is built by the Woodbury identity. A weight's score
    is w^2 / (2 [F^-1]_ii), that of a group of weights w_Q' ([F^-1]_QQ)^-1 w_Q / 2; the weights that stay in a block
    take the step -F^-1_:Q ([F^-1]_QQ)^-1 w_Q.
    """

    source = "Kurtic et al. 2022, arXiv 2203.07259"
    global_sparsity: bool = field(FLAG, True, doc="One budget for all weights together; `scope` goes before it.")
    num_grads: int = field(integer(1), 1024, doc="Gradients that are sampled for an update.")
    damp: float = field(number(0, above=True), 1e-7, doc="Added to the diagonal of the Fisher matrix.")
    fisher_block_size: int = field(integer(1), 50, unit="weights", doc="Size of its blocks.")
    num_recomputations: int = field(
        integer(1), 1, doc="Steps from one sparsity to the next, the Fisher matrix computed anew for each."
    )
    grad_sampler_kwargs: dict[str, Any] = field(MAPPING, {}, doc="batch_size: examples of a sampled gradient.")

    def check(self) -> None:
        super().check()
        try:
            read_fields(f"{self.type_name}.grad_sampler_kwargs", _SAMPLER, self.grad_sampler_kwargs)
        except FieldError as error:
            raise self.wrong("grad_sampler_kwargs", f"{error.field} {error.message}") from None
        if self.mask_type not in ("unstructured", "block_1x4"):
            raise self.wrong("mask_type", f"must be unstructured or block4, not {self.mask_type!r}")
        if self.mask_type == "block_1x4" and self.fisher_block_size % 4:
            raise self.wrong("fisher_block_size", f"must be a multiple of 4 with block4, not {self.fisher_block_size}")

    def budget_scope(self) -> str:
        return self.scope if "scope" in self.given or not self.global_sparsity else "global"

    def attach(self, training: Training) -> None:
        super().attach(training)
        if self.mask_type == "block_1x4":
            for name, target in self.targets.items():
                if target.parameter.ndim != 2 or target.transposed or target.parameter.shape[1] % 4:
                    raise self.wrong(
                        "mask_type", f"block4 needs linear layers with 4n inputs, {name} is of another kind"
                    )

    def update(self, training: Training) -> None:
        training.refuse_native(self.targets)
        if training.grad_sampler is None:
            raise self.wrong(None, "needs a grad_sampler, which gives the losses of fresh batches")
        goal = self.sparsities(training.clock, training.step)
        weights = {name: target.parameter for name, target in self.targets.items()}
        together = zero_fraction(weights.values())
        now = {
            name: together if self.budget_scope() != "uniform" else zero_fraction([w]) for name, w in weights.items()
        }
        for part in range(1, self.num_recomputations + 1):
            share = part / self.num_recomputations
            wanted = {name: now[name] + share * (goal[name] - now[name]) for name in goal}
            self._prune(training, wanted if part < self.num_recomputations else goal, seed=training.step * 1000 + part)

    def _prune(self, training: Training, sparsities: dict[str, float], seed: int) -> None:
        inverse = self._inverse_fisher(training, seed)
        with torch.no_grad():
            scores = {name: self._scores(name, blocks) for name, blocks in inverse.items()}
            masks = self.masks_by_score(scores, sparsities, scope=self.budget_scope(), structure=self.mask_type)
            masks = training.agree(masks)
            for name, mask in masks.items():
                weight = self.targets[name].parameter
                step = self._step(weight.detach(), inverse.pop(name), (~mask) & (weight != 0))
                weight.add_(training.share(step))
        training.masks.hold(self.owner, self.targets, masks)

    def _inverse_fisher(self, training: Training, seed: int) -> dict[str, Tensor]:
        """(blocks, size, size) by weight name; pruned weights are in no relation to others."""
        size = self.fisher_block_size
        weights = {name: target.parameter for name, target in self.targets.items()}
        inverse = {}
        for name, weight in weights.items():
            eye = torch.eye(size, device=weight.device) / self.damp
            inverse[name] = eye.expand(-(-weight.numel() // size), size, size).clone()
        gradients = self._gradients(training, list(weights.values()), seed)
        # Several gradients at once: the inverse is read and written once for all of them. A quarter of it holds them.
        while together := list(islice(gradients, max(1, size // 4))):
            for name, parts in zip(weights, zip(*together, strict=True), strict=True):
                pruned = weights[name].detach() == 0
                g = torch.stack([self._blocks(part.float().masked_fill(pruned, 0.0)) for part in parts], -1)
                if not g.isfinite().all():
                    raise self.wrong(None, f"a sampled gradient of {name} is not finite")
                product = inverse[name] @ g
                inner = g.mT @ product
                largest = inner.diagonal(dim1=-2, dim2=-1).amax(-1)
                # Rounding of large entries must not outweigh the number of gradients, which makes it definite.
                inner.diagonal(dim1=-2, dim2=-1).add_((self.num_grads + 1e-6 * len(parts) * largest).unsqueeze(-1))
                root = torch.linalg.cholesky(inner)
                step = torch.linalg.solve_triangular(root, product.mT, upper=False)
                inverse[name].baddbmm_(step.mT, step, alpha=-1)
        return inverse

    def _gradients(self, training: Training, weights: list[Tensor], seed: int) -> Iterator[tuple[Tensor, ...]]:
        assert training.grad_sampler is not None
        # BatchNorm's statistics and dropout are those of evaluation: sampling leaves no trace in the model.
        modes = {module: module.training for module in training.model.modules()}
        training.model.eval()
        try:
            batch_size = self.grad_sampler_kwargs.get("batch_size")
            for loss in training.grad_sampler(self.num_grads, seed, batch_size):
                yield torch.autograd.grad(loss, weights)
        finally:
            for module, mode in modes.items():
                module.training = mode

    def _blocks(self, values: Tensor) -> Tensor:
        """(blocks, size) of consecutive weights, the last one filled up with zeros."""
        flat = values.reshape(-1)
        return torch.nn.functional.pad(flat, (0, -flat.numel() % self.fisher_block_size)).view(
            -1, self.fisher_block_size
        )

    def _scores(self, name: str, inverse: Tensor) -> Tensor:
        weight = self.targets[name].parameter.detach()
        w = self._blocks(weight.float())
        if self.mask_type == "unstructured":
            scores = w.square() / (2 * inverse.diagonal(dim1=-2, dim2=-1))
        else:
            group = w.view(len(w), -1, 4)
            count = group.shape[1]
            corners = inverse.view(len(w), count, 4, count, 4)[:, range(count), :, range(count), :].transpose(0, 1)
            solved = torch.linalg.solve(corners, group.unsqueeze(-1)).squeeze(-1)
            scores = ((group * solved).sum(-1, keepdim=True) / 2).expand_as(group).reshape(w.shape)
        return scores.reshape(-1)[: weight.numel()].view_as(weight)

    def _step(self, weight: Tensor, inverse: Tensor, going: Tensor) -> Tensor:
        """What the weights of each block change by when those that go are set to zero."""
        q = self._blocks(going.float()).bool()
        w = self._blocks(weight.float()).masked_fill(~q, 0.0)
        both = q.unsqueeze(-1) & q.unsqueeze(-2)
        eye = torch.eye(q.shape[-1], device=weight.device)
        multipliers = torch.linalg.solve(torch.where(both, inverse, eye), w.unsqueeze(-1))
        step = -(inverse @ multipliers).squeeze(-1)
        return step.reshape(-1)[: weight.numel()].view_as(weight).to(weight.dtype)
