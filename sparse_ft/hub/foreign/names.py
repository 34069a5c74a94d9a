"""Names of the tensors in a checkpoint, and in the model that it is to fit."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from sparse_ft.hub.errors import ModelError

_WRAPPERS = ("module.", "_orig_mod.")  # of DataParallel and DistributedDataParallel, of torch.compile


def strip_wrappers(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the model inside DataParallel and torch.compile, in any order of wrapping."""
    names = list(state_dict)
    while names and (prefix := next((p for p in _WRAPPERS if all(n.startswith(p) for n in names)), None)):
        names = [name.removeprefix(prefix) for name in names]
    return dict(zip(names, state_dict.values(), strict=True))


def renamed(tensors: Mapping[str, Tensor], renames: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors under other names: each key of `renames` is a regular expression, replaced where it is found.

    Raises:
        ModelError: An expression is not one, or changes no name, or two tensors get the same name.
    """
    names = list(tensors)
    for pattern, replacement in renames.items():
        try:
            changed = [re.sub(pattern, replacement, name) for name in names]
        except re.error as error:
            raise ModelError(f"rename {pattern!r}={replacement!r} is not a regular expression: {error}") from error
        if changed == names and names:
            raise ModelError(f"rename {pattern!r} changes none of the names, such as {names[0]!r}")
        names = changed
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ModelError(f"the renames give two tensors the name {twice!r}")
    return dict(zip(names, tensors.values(), strict=True))


def fit(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors that a model takes, in its order; counters of batch norms may be missing.

    Raises:
        ModelError: A name or a shape differs; the message has one of each side, so that a rename can be written.
    """
    missing = [name for name in expected if name not in state_dict and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state_dict if name not in expected]
    if missing or unknown:
        parts = [f"the model needs {missing[0]}{_more(missing)}"] if missing else []
        parts += [f"the checkpoint has {unknown[0]}{_more(unknown)}"] if unknown else []
        raise ModelError(
            f"{where}: {', '.join(parts)}, unknown to the other: another architecture, or other names (give renames)"
        )
    for name, tensor in state_dict.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"{where}: {name} has shape {tuple(tensor.shape)} in the checkpoint, but the model needs "
                f"{tuple(expected[name].shape)}"
            )
    return {name: state_dict[name] for name in expected if name in state_dict}


def _more(names: Iterable[str]) -> str:
    count = len(list(names))
    return f" (and {count - 1} more)" if count > 1 else ""
