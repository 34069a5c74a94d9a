"""Parameters that a recipe names: `__ALL_PRUNABLE__`, `__ALL__`, exact names and `re:` patterns."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_ft.masks.names import PATTERN_PREFIX, WRAPPER_PREFIX
from sparse_ft.masks.targets import dense_shape, has_prunable_type, prunable_layers, unwrap
from sparse_ft.nn import SparseModule, is_transformers_conv1d

from .fields import TEXT, Kind

ALL_PRUNABLE = "__ALL_PRUNABLE__"
ALL = "__ALL__"

# Patterns come from strangers: unbounded repeats, nested or many, can make a match take forever.
_MAX_PATTERN = 300
_MAX_REPEATS = 6
_LONGEST_NAME = 400

_TIMM_PREFIX = "timm_model."  # of transformers' wrapper around a timm model, whose own names recipes use

_ALSO_PRUNABLE = (nn.Embedding, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Target:
    """A parameter to act on: `name` is its key in the state dict of the model without wrappers."""

    name: str
    module: nn.Module
    parameter: nn.Parameter

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        return is_transformers_conv1d(self.module)


def _read_names(value: object) -> str | list[str]:
    if value in (ALL_PRUNABLE, ALL):
        return str(value)
    if isinstance(value, str):
        raise ValueError(f"for one parameter write [{value}]")
    if not isinstance(value, list):
        raise ValueError
    for entry in value:
        TEXT.read(entry)
        if entry.startswith(PATTERN_PREFIX):
            compile_pattern(entry)
    return list(value)


TARGETS = Kind(f'{ALL_PRUNABLE}, {ALL} or a list of names and "re:" patterns', _read_names)


def _read_ignored(value: object) -> list[str]:
    if not isinstance(value, list):
        raise ValueError
    read = _read_names(value)
    assert isinstance(read, list)
    return read


IGNORED = Kind('a list of names and "re:" patterns', _read_ignored)


def compile_pattern(entry: str) -> re.Pattern[str]:
    """The regular expression of a `re:` entry.

    Raises:
        ValueError: it is none, or one whose matching may take forever.
    """
    source = entry.removeprefix(PATTERN_PREFIX)
    if len(source) > _MAX_PATTERN:
        raise ValueError(f"a pattern may have {_MAX_PATTERN} characters, this one has {len(source)}")
    try:
        pattern = re.compile(source)
        repeats = _count_repeats(re._parser.parse(source), inside=False)  # type: ignore[attr-defined]
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{source!r} is not a regular expression: {error}") from None
    if repeats > _MAX_REPEATS:
        raise ValueError(f"{source!r} has {repeats} open repeats (* or +), {_MAX_REPEATS} are allowed")
    return pattern


def _count_repeats(parsed: Iterable, inside: bool) -> int:
    """Unbounded repeats of a parsed pattern; one whose body can match in several ways is an error."""
    count = 0
    for operation, argument in parsed:
        if str(operation) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, body = argument
            if inside and least != most:
                raise re.error("a repeat inside a repeat may take forever to match")
            # A long bounded repeat is as slow as an open one.
            count += (most > 20) + _count_repeats(body, inside or most > 1)
        else:
            if inside and str(operation) == "BRANCH":
                raise re.error("alternatives inside a repeat may take forever to match")
            count += sum(_count_repeats(body, inside) for body in _bodies(argument))
    return count


def _bodies(argument: object) -> list[Iterable]:
    if isinstance(argument, re._parser.SubPattern):  # type: ignore[attr-defined]
        return [argument]
    if isinstance(argument, tuple | list):
        return [body for each in argument for body in _bodies(each)]
    return []


def named_targets(model: nn.Module, *, everything: bool = False) -> dict[str, Target]:
    """Every parameter that can be named, in module order; one that several modules share under its first name.

    Args:
        everything: all parameters; otherwise those that `__ALL_PRUNABLE__` stands for: the weights of Linear,
            Embedding, convolutions of all kinds, transformers' Conv1D and native sparse layers.
    """
    found: dict[str, Target] = {}
    seen: set[int] = set()
    for prefix, module in unwrap(model).named_modules():
        prunable = has_prunable_type(module) or isinstance(module, _ALSO_PRUNABLE)
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or not (everything or (prunable and name == "weight")):
                continue
            seen.add(id(parameter))
            full = f"{prefix}.{name}" if prefix else name
            found[full] = Target(full, module, parameter)
    return found


def find_targets(model: nn.Module, wanted: str | Sequence[str], ignore: Sequence[str] = ()) -> dict[str, Target]:
    """The parameters that a recipe's field names, in module order.

    Args:
        wanted: as the `TARGETS` kind reads it. A name is that of a parameter (`layer1.0.conv1.weight`) or of a layer,
            which stands for its weight. `re:` patterns are matched from the beginning (`re.match`) against names of
            parameters. Leading `module.` (DistributedDataParallel) and `timm_model.` (transformers' wrapper of timm
            models) may be there or not.
        ignore: names and patterns to leave out.

    Raises:
        ValueError: an entry matches nothing, and which names are near.
    """
    every = named_targets(model, everything=True)
    if isinstance(wanted, str):
        chosen = set(named_targets(model, everything=wanted == ALL))
    else:
        chosen = {name for entry in wanted for name in _select(entry, every)}
    chosen -= {name for entry in ignore for name in _select(entry, every)}
    return {name: target for name, target in every.items() if name in chosen}


def _select(entry: str, every: dict[str, Target]) -> list[str]:
    if entry.startswith(PATTERN_PREFIX):
        pattern = compile_pattern(entry)
        short = [name for name in every if len(name) <= _LONGEST_NAME]
        names = [name for name in short if any(map(pattern.match, (name, name.removeprefix(_TIMM_PREFIX))))]
        names = names or [name for name in short if any(map(pattern.match, _wrapped(name)))]
    else:
        bare = entry.removeprefix(WRAPPER_PREFIX).removeprefix(_TIMM_PREFIX)
        spellings = (bare, f"{bare}.weight", f"{_TIMM_PREFIX}{bare}", f"{_TIMM_PREFIX}{bare}.weight")
        names = [name for name in spellings if name in every][:1]
    if not names:
        near = difflib.get_close_matches(entry, every, n=3, cutoff=0.5) or list(every)[:3]
        hint = f"; names of the model are {', '.join(near)}" if near else "; the model has none to choose from"
        raise ValueError(f"{entry!r} matches no parameter of the model{hint}")
    return names


def _wrapped(name: str) -> tuple[str, str]:
    return WRAPPER_PREFIX + name, WRAPPER_PREFIX + name.removeprefix(_TIMM_PREFIX)


def unusual_targets(model: nn.Module, targets: Iterable[str]) -> dict[str, str]:
    """Those targets that pruning usually leaves dense, and why: stem, classifier head, embeddings, tied weights."""
    skipped = prunable_layers(model).skipped
    reasons = {f"{name}.weight" if name else "weight": reason for name, reason in skipped.items()}
    for name, target in named_targets(model).items():
        if isinstance(target.module, nn.Embedding):
            reasons[name] = "embedding"
    return {name: reasons[name] for name in targets if name in reasons}


def is_native(target: Target) -> bool:
    """Whether the parameter is the vector of a native sparse layer's nonzeros."""
    return isinstance(target.module, SparseModule) and target.parameter is target.module.weight


def dense_shape_of(target: Target) -> torch.Size:
    """Shape of the parameter in the state dict."""
    return dense_shape(target.module) if is_native(target) else target.parameter.shape


def zero_fraction(parameters: Iterable[Tensor]) -> float:
    """Zeros / weights."""
    total = zeros = 0
    for parameter in parameters:
        total += parameter.numel()
        zeros += parameter.numel() - int(torch.count_nonzero(parameter.detach()))
    return zeros / total if total else 0.0
