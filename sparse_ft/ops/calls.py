"""Calls of operators that leave out the dispatcher where it has nothing to add.

The way through the dispatcher to an operator written in Python takes 30 µs, and a layer goes it three times in a
training step: more than a small layer's arithmetic. With plain tensors and nobody watching (a tracer, a mode, a
transform, the profiler) the outcome is the same without it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from sparse_ft.ops import _native
from sparse_ft.ops._native import unwatched

_implementations: dict[str, Callable] = {}


def provide(implementations: dict[str, Callable]) -> None:
    """What computes each operator on plain tensors."""
    _implementations.update(implementations)


def transformed() -> bool:
    """Whether a mode, a transform or a tracer gives calls another meaning."""
    return not _native.untransformed()


def _any_requires_grad(args: tuple) -> bool:
    for arg in args:
        if isinstance(arg, Tensor) and arg.requires_grad:
            return True
    return False


def _operator(name: str) -> tuple[Callable, int]:
    """The operator and how many arguments it knows. An implementation may take more, which do without it."""
    operator = getattr(torch.ops.sparse_ft, name).default
    return operator, len(operator._schema.arguments)


def plain(*args: Any) -> bool:
    """Whether a call with these arguments means what it says: the tensors are ordinary ones, and nobody watches."""
    return not is_dynamo_compiling() and unwatched(*args)


def caller(name: str, differentiable: Callable | None = None) -> Callable[..., Any]:
    """A function that computes operator `name`; by way of `differentiable` where a gradient is recorded.

    An operator without one is itself a gradient. Recording through it is left to its Autograd kernel.

    Args:
        differentiable: a `torch.autograd.Function` that computes by its attribute `compute`, or any function.
    """
    operator, count = _operator(name)
    compute = _implementations[name]
    if isinstance(differentiable, type) and issubclass(differentiable, torch.autograd.Function):
        # What was seen to be plain here need not be looked at again, by the operator or by the class's own `apply`,
        # which asks for transforms.
        kind: Any = type(differentiable.__name__, (differentiable,), {"compute": staticmethod(compute)})
        differentiable = super(torch.autograd.Function, kind).apply

    def call(*args):
        if is_dynamo_compiling() or not unwatched(*args):
            return operator(*args[:count])
        if torch.is_grad_enabled() and _any_requires_grad(args):
            return operator(*args[:count]) if differentiable is None else differentiable(*args)
        return compute(*args)

    return call


def below_autograd(name: str) -> Callable[..., Any]:
    """The same for an operator's own Autograd kernel."""
    operator, count = _operator(name)

    def call(*args):
        if unwatched(*args):
            return _implementations[name](*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args[:count])

    return call
