"""Layers that change between dense and native sparse form while they train, their optimizer's state with them.

While masks stand still, pruned layers run natively where that is faster; for a step at which masks change, or that
looks at gradients of pruned weights, they are dense. Measuring for the choice takes a few percent of the time at most.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.conversion import ConversionReport, convert, to_dense
from sparse_ft.masks.names import weight_name
from sparse_ft.masks.targets import typed_layers, unwrap
from sparse_ft.nn import SparseModule
from sparse_ft.optimizer_state import exchange
from sparse_ft.parallel import convert_alike
from sparse_ft.processes import of_first_process
from sparse_ft.session import SparseSession

logger = logging.getLogger(__name__)

GAP = 8  # steps for which masks have to stand still before layers change their form
SHARE = 0.03  # of the training time that measuring may take while masks still change


class LiveForms:
    """Keeps the layers of a model in the form that suits the state of its recipe.

    Args:
        session: the recipe at work.
        kept: masks of other weights whose zeros are kept, by weight name.
        example_inputs: gives a batch, for policy "auto".
        policy, min_sparsity, ignore: see `sparse_ft.convert`.

    Attributes:
        report: of the last conversion that measured or decided anew.
    """

    def __init__(
        self,
        session: SparseSession,
        kept: Mapping[str, Tensor],
        example_inputs: Callable[[], Any],
        *,
        policy: str = "auto",
        min_sparsity: float = 0.5,
        ignore: Sequence[str] = (),
    ):
        self._session = session
        self._model = session.training.model
        self._kept = dict(kept)
        self._example_inputs = example_inputs
        self._policy = policy
        self._min_sparsity = min_sparsity
        self._ignore = list(ignore)
        self._seen = session.convertible
        self._spent = 0.0
        self._began = time.perf_counter()
        self._chosen: list[str] = native_layers(self._model)
        self._final = False
        self.report: ConversionReport | None = None

    def follow(self) -> bool:
        """After a step, its gradients let go: takes the forms that the next needs; returns whether any changed."""
        session = self._session
        if session.acts_within(1):
            return self._densify()
        if session.acts_within(GAP):
            return False
        changed = not _same(self._seen, convertible := session.convertible)
        self._seen = convertible
        if not changed and (native_layers(self._model) or not self._chosen):
            return False
        masks = self._kept | convertible
        if not masks or (self._policy == "none"):
            return False
        return self._nativize(masks)

    def _densify(self) -> bool:
        native = {weight_name(name) for name in native_layers(self._model)}
        if not native & (self._session.masks.keys() | self._session.waiting):
            return False
        with self._exchanging():
            to_dense(self._model)
        return True

    def _nativize(self, masks: dict[str, Tensor]) -> bool:
        before = native_layers(self._model)
        began = time.perf_counter()
        settled = self._session.settled
        # By the clock of one process: all have to do the same.
        affordable = self._policy == "always" or of_first_process(self._spent <= SHARE * (began - self._began))
        with self._exchanging():
            to_dense(self._model)
            if (settled and not self._final) or affordable:
                self._final = settled
                self.report = convert_alike(
                    self._model,
                    self._example_inputs if self._policy == "auto" else lambda: None,
                    policy=self._policy,
                    min_sparsity=self._min_sparsity,
                    ignore=[*self._ignore, *self._others(masks)],
                    masks=masks,
                )
                self._chosen = native_layers(self._model)
                if self._policy == "auto":
                    self._spent += time.perf_counter() - began
            else:
                again = [name for name in self._chosen if weight_name(name) in masks]
                convert(self._model, layers=again, min_sparsity=self._min_sparsity, masks=masks)
        return native_layers(self._model) != before

    def _others(self, masks: Mapping[str, Tensor]) -> list[str]:
        """Layers that no mask holds now; zeros that they may have can come back."""
        held = self._session.masks.keys() | self._session.waiting
        return [
            name for name in typed_layers(self._model) if weight_name(name) in held and weight_name(name) not in masks
        ]

    @contextmanager
    def _exchanging(self) -> Iterator[None]:
        with preserved_parameters(self._model, self._session.training.optimizer):
            yield
        self._session.rebind()


def _same(masks: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    # A mask that is set anew is another tensor.
    return masks.keys() == others.keys() and all(mask is others[name] for name, mask in masks.items())


def native_layers(model: nn.Module) -> list[str]:
    """Names of the layers in native form."""
    return [name for name, module in unwrap(model).named_modules() if isinstance(module, SparseModule)]


@contextmanager
def preserved_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, layers may change their form: the optimizer goes on with their new parameters and the state they had."""
    before = {name: module for name, module in unwrap(model).named_modules() if hasattr(module, "weight")}
    yield
    for name, module in unwrap(model).named_modules():
        old = before.get(name)
        if old is None or old is module:
            continue
        if isinstance(module, SparseModule) or isinstance(old, SparseModule):
            exchange(optimizer, _parameter(old), _parameter(module), _carry(old, module))


def _parameter(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _carry(old: nn.Module, new: nn.Module) -> Callable[[Tensor], Tensor]:
    """How a tensor of the old parameter's shape becomes one of the new one's."""

    def carry(values: Tensor) -> Tensor:
        dense = values
        if isinstance(old, SparseModule):
            dense = old.pattern.to_dense(values)
            dense = dense.t() if old.stored_transposed else dense
        if isinstance(new, SparseModule):
            oriented = dense.t() if new.stored_transposed else dense
            return new.pattern.from_dense(oriented).reshape(-1, 1)
        return dense.contiguous()

    return carry
