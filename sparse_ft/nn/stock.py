"""Stock modules beside sparse layers: the same modules with a forward that minds the layout of sparse convolutions, or
that is native too.

A module is adapted in place, by its class: it keeps its parameters, buffers, hooks, state dict and results, and
`restore_stock` takes the adaptation back. An adapter is a mixin whose `forward` goes before the stock one; where it
has nothing to add it calls `super().forward`.
"""

import functools
import importlib
import sys
from collections.abc import Callable

from torch import nn

_ADAPTERS: dict[str, tuple[str, type]] = {}  # name of a stock class -> its library, and the mixin
_EVERYWHERE: set[type] = set()  # mixins that have nothing to do with layouts


def adapts(library: str, *names: str, everywhere: bool = False) -> Callable[[type], type]:
    """Registers a mixin as the adapter of the classes `names` of the module `library`; `everywhere` is one that gains
    in models without sparse convolutions, too."""

    def register(mixin: type) -> type:
        _ADAPTERS.update((name, (library, mixin)) for name in names)
        if everywhere:
            _EVERYWHERE.add(mixin)
        return mixin

    return register


@functools.cache
def _adapted(mixin: type, stock: type) -> type:
    # Pickle finds the class by `__getattr__`.
    return type(_PREFIX + stock.__name__, (mixin, stock), {"__module__": __name__, "__doc__": mixin.__doc__})


_PREFIX = "Layout"


def _adapted_class(stock: type) -> type | None:
    library, mixin = _ADAPTERS.get(stock.__name__, ("", object))
    # A library that is not loaded has no modules here.
    if getattr(sys.modules.get(library), stock.__name__, None) is not stock:
        return None
    return _adapted(mixin, stock)


def __getattr__(name: str) -> type:
    stock = name.removeprefix(_PREFIX)
    if name.startswith(_PREFIX) and stock in _ADAPTERS:
        library, mixin = _ADAPTERS[stock]
        return _adapted(mixin, getattr(importlib.import_module(library), stock))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def stock_type(module: nn.Module) -> type:
    """The class of the module, or the stock one that it had before it was adapted."""
    kind = type(module)
    return kind.__bases__[1] if kind.__module__ == __name__ else kind


def follow_layout(module: nn.Module, *, convolutions: bool = True) -> bool:
    """Adapt a stock module in place; False for one that is of no known stock class, or that has nothing to gain
    without sparse `convolutions` in its model."""
    adapted = _adapted_class(type(module))
    if adapted is not None and not convolutions and adapted.__bases__[0] not in _EVERYWHERE:
        return False
    if adapted is not None:
        module.__class__ = adapted
    return adapted is not None


def restore_stock(module: nn.Module) -> None:
    """The inverse of `follow_layout`."""
    module.__class__ = stock_type(module)
