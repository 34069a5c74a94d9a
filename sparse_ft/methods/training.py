"""What a modifier sees of a training, and the masks that it holds weights to."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparse_ft.masks.targets import unwrap
from sparse_ft.optimizer_state import clear_pruned, inner_optimizer
from sparse_ft.processes import is_parallel

from .clock import Clock, SparsemlClock
from .targets import Target, is_native

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# (count, seed, batch size or None) -> that many losses with their graphs, the same for the same seed
GradSampler = Callable[[int, int, int | None], Iterable[Tensor]]

logger = logging.getLogger(__name__)


@dataclass
class _Held:
    """A weight under masks: `kept` is where all owners agree, `pruned` its inverse, both of the weight's shape; `bits`
    has all bits where it is kept."""

    target: Target
    by_owner: dict[int, Tensor] = field(default_factory=dict)
    kept: Tensor = field(default_factory=lambda: torch.empty(0))
    pruned: Tensor = field(default_factory=lambda: torch.empty(0))
    bits: Tensor = field(default_factory=lambda: torch.empty(0))
    hook: torch.utils.hooks.RemovableHandle | None = None
    seen: Tensor | None = None  # the gradient, also where it is pruned

    def see(self, gradient: Tensor) -> None:
        """Notes a gradient that has accumulated and is to be masked: pruned places have only what came last."""
        before = torch.zeros_like(gradient) if self.seen is None else self.seen
        self.seen = torch.where(self.kept, gradient, before + gradient)

    def renew(self) -> None:
        """Takes the masks of the owners together."""
        masks = list(self.by_owner.values())
        self.kept = masks[0] if len(masks) == 1 else torch.stack(masks).all(0)
        self.pruned = ~self.kept
        if not is_native(self.target):
            integer = _INTEGERS[self.target.parameter.element_size()]
            self.bits = torch.zeros_like(self.target.parameter, dtype=integer).masked_fill_(self.kept, -1)

    def zero(self, values: Tensor) -> None:
        """Zeroes pruned places. By the bits: not a product, where 0 * inf is NaN, and several times faster than
        `masked_fill_`, which branches at every element."""
        values.view(self.bits.dtype).bitwise_and_(self.bits)


class WeightMasks:
    """Holds weights to masks: zero weights, zero gradients and zero optimizer state wherever a mask is False.

    Several modifiers may hold the same weight; it trains where all of them let it.

    Args:
        clears_state: whether the optimizer's state is kept at zero; SparseML leaves it as it is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, clears_state: bool = True):
        self._optimizer = optimizer
        self._clears_state = clears_state
        self._held: dict[str, _Held] = {}
        self._released: list[int] = []
        self._masked_at = 0  # `changes` when gradients were masked last
        self.changes = 0  # how often masks were set or let go
        self.dense_gradients = False  # gradients of this step reach pruned weights, which are about to train
        self._watched = False

    def names(self) -> list[str]:
        """Of the weights under a mask."""
        return list(self._held)

    def kept(self, name: str) -> Tensor | None:
        """bool, True where the weight trains; None if no mask holds it."""
        held = self._held.get(name)
        return None if held is None else held.kept

    def of(self, owner: int) -> dict[str, Tensor]:
        """The masks of one owner by weight name."""
        return {name: held.by_owner[owner] for name, held in self._held.items() if owner in held.by_owner}

    @torch.no_grad()
    def hold(self, owner: int, targets: Mapping[str, Target], masks: Mapping[str, Tensor]) -> None:
        """Sets an owner's masks, by weight name; what is newly pruned is zeroed at once."""
        self.changes += 1
        if owner in self._released:
            self._released.remove(owner)
        for name, mask in masks.items():
            target = targets[name]
            held = self._held.setdefault(name, _Held(target))
            held.by_owner[owner] = mask.to(target.parameter.device)
            self._renew(held)

    def release(self, owner: int, *, at_once: bool = False) -> None:
        """Lets an owner's weights go: after this step (its masks still stand for it), or at once."""
        if not at_once:
            self._released.append(owner)
            return
        self.changes += 1
        for name, held in list(self._held.items()):
            if held.by_owner.pop(owner, None) is None:
                continue
            if held.by_owner:
                self._renew(held)
            else:
                self._forget(name)

    def _renew(self, held: _Held) -> None:
        held.renew()
        if is_native(held.target):
            return  # its pattern is the mask
        parameter = held.target.parameter
        held.zero(parameter.data)
        if self._clears_state:
            clear_pruned(self._optimizer, parameter, held.pruned)
        if held.hook is None and parameter.requires_grad:
            # From the moment that it is accumulated, so that clipping sees what the optimizer sees.
            held.hook = parameter.register_post_accumulate_grad_hook(self._gradient_hook(held))

    def _gradient_hook(self, held: _Held):
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None and not self.dense_gradients:
                if self._watched:
                    held.see(parameter.grad)
                held.zero(parameter.grad)

        return hook

    @property
    def watched(self) -> bool:
        """Whether gradients of this step are noted before they are masked, for methods that look at them.

        The optimizer, and what clips gradients before it, see them masked as at any other step.
        """
        return self._watched

    @watched.setter
    def watched(self, watched: bool) -> None:
        self._watched = watched
        for held in self._held.values():
            held.seen = None

    @torch.no_grad()
    def gradient(self, name: str) -> Tensor | None:
        """The gradient of this step also where it is pruned, of a weight under a mask; see `watched`.

        Its average over all processes, which is computed here.
        """
        held = self._held[name]
        if held.seen is None:
            return held.target.parameter.grad
        if not is_parallel():
            return held.seen
        average = held.seen / torch.distributed.get_world_size()
        torch.distributed.all_reduce(average)
        return average

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Zeroes the gradients of pruned weights, unless the hooks have done so: they have not if masks have changed
        since, if gradients were to be dense, or if an all-reduce came after."""
        done = self._masked_at == self.changes and not self.dense_gradients and not is_parallel()
        self._masked_at = self.changes
        for held in self._held.values():
            if done and held.hook is not None:
                continue
            if held.target.parameter.grad is not None and not is_native(held.target):
                held.zero(held.target.parameter.grad)

    @torch.no_grad()
    def apply(self) -> None:
        """Zeroes pruned weights, which some optimizers move without a gradient; then lets go what is released."""
        for held in self._held.values():
            if is_native(held.target):
                continue
            held.zero(held.target.parameter.data)
        for owner in self._released:
            self.release(owner, at_once=True)
        self._released.clear()

    def rebind(self, targets: Mapping[str, Target]) -> None:
        """Goes on with the parameters that layers have after they have changed their form; by weight name."""
        for name, held in self._held.items():
            if held.target.parameter is targets[name].parameter:
                continue
            if held.hook is not None:
                held.hook.remove()
                held.hook = None
            held.target = targets[name]
            self._renew(held)

    def remove(self) -> None:
        """Lets all weights go."""
        for name in list(self._held):
            self._forget(name)

    def _forget(self, name: str) -> None:
        held = self._held.pop(name)
        if held.hook is not None:
            held.hook.remove()


class Training:
    """A training as modifiers see it.

    Attributes:
        model: without wrappers, so that names have no prefix.
        optimizer: without accelerate's wrapper.
        clock, step: where the training is.
        masks: of the weights.
        teacher: to learn from, or None.
        grad_sampler: gives the losses of fresh batches, or None; see `SparseSession`.
        sparseml: whether faults of SparseML are to be reproduced.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, clock: Clock):
        self.model = unwrap(model)
        self.optimizer = inner_optimizer(optimizer)
        self.clock = clock
        self.step = 0
        self.teacher: nn.Module | None = None
        self.grad_sampler: GradSampler | None = None
        self.sparseml = isinstance(clock, SparsemlClock)
        self.masks = WeightMasks(optimizer, clears_state=not self.sparseml)

    @property
    def epoch(self) -> float:
        return self.step / self.clock.steps_per_epoch

    def need_teacher(self) -> nn.Module:
        """The teacher.

        Raises:
            ValueError: there is none.
        """
        if self.teacher is None:
            raise ValueError('needs a teacher: give a model, "self" for the model as it is now, or "disable"')
        return self.teacher

    def groups(self, indices: Iterable[int] | None) -> list[dict]:
        """Parameter groups of the optimizer by their indices, all for None.

        Raises:
            ValueError: there is no such group.
        """
        groups = self.optimizer.param_groups
        if indices is None:
            return groups
        wrong = [i for i in indices if i >= len(groups)]
        if wrong:
            raise ValueError(f"the optimizer has {len(groups)} parameter groups, none with index {wrong[0]}")
        return [groups[i] for i in indices]

    def agree(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """The masks of the first process, for all of them: rounding may order two scores differently."""
        if not is_parallel():
            return masks
        flat = torch.cat([mask.flatten() for mask in masks.values()]).to(torch.uint8)
        torch.distributed.broadcast(flat, src=0)
        parts = flat.bool().split([mask.numel() for mask in masks.values()])
        return {name: part.view(mask.shape) for (name, mask), part in zip(masks.items(), parts, strict=True)}

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        if not is_parallel():
            return values
        values = values / torch.distributed.get_world_size()
        torch.distributed.all_reduce(values)
        return values

    def share(self, values: Tensor) -> Tensor:
        """The values of the first process, for all of them."""
        if is_parallel():
            values = values.contiguous()
            torch.distributed.broadcast(values, src=0)
        return values

    def refuse_native(self, targets: Mapping[str, Target]) -> None:
        """Makes sure that the weights are dense.

        Raises:
            ValueError: one belongs to a native sparse layer, whose pattern is fixed.
        """
        native = [name for name, target in targets.items() if is_native(target)]
        if native:
            raise ValueError(
                f"{native[0]} belongs to a native sparse layer, whose pattern is fixed: call "
                "sparse_ft.to_dense(model) first"
            )
