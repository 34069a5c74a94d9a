"""A recipe: text in, checked modifiers out, and text again."""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sparse_ft.atomic import replacing
from sparse_ft.methods import FieldError, Modifier, find_modifier
from sparse_ft.methods.clock import Phase
from sparse_ft.methods.fields import NEVER
from sparse_ft.methods.learning_rate import LearningRateModifierBase
from sparse_ft.methods.pruning import MaskedTargets

from .document import Document, Entry, Group, Stage, parse_document
from .errors import RecipeError
from .expressions import ExpressionError, Variables
from .overrides import parse_overrides
from .source import front_matter, read_source
from .writer import dump_document

logger = logging.getLogger(__name__)

Compat = Literal["sparseml"] | None

# What the mapping dialect calls the fields of the flat one.
_NEW_NAMES = {
    "start": "start_epoch",
    "end": "end_epoch",
    "update": "update_frequency",
    "targets": "params",
    "mask_structure": "mask_type",
    "update_scheduler": "inter_func",
}
# Fields that old recipes have and nothing ever read.
_DROPPED = ("log_types",)


class Recipe:
    """What to do to a model while it trains: a list of modifiers; see docs/recipes.md.

    Two recipes are equal if they are written alike: dialect, stages, variables and modifiers in their order.

    Attributes:
        name: where it comes from, for messages.
        compat: "sparseml" for the behaviour of sparseml 1.8.0 with its faults, None for the exact one.
        document: the recipe as it is written.
        modifiers: in the order of the recipe, checked; those passed over with `ignore_unknown` are not among them.
    """

    def __init__(self, document: Document, *, name: str, compat: Compat = None, ignore_unknown: bool = False):
        if compat not in (None, "sparseml"):
            raise ValueError(f'compat must be "sparseml" or None, not {compat!r}')
        self.name = name
        self.compat = compat
        self.document = document
        self.ignore_unknown = ignore_unknown
        self._lines: dict[int, Entry] = {}
        self.modifiers: list[Modifier] = []
        for stage, entry in document.entries():
            modifier = self._make(stage, entry)
            if modifier is not None:
                modifier.owner = len(self.modifiers)
                self._lines[modifier.owner] = entry
                self.modifiers.append(modifier)

    @classmethod
    def load(
        cls,
        source: "str | Path | Recipe",
        *,
        args: str | Mapping[str, Any] | None = None,
        compat: Compat = None,
        ignore_unknown: bool = False,
    ) -> "Recipe":
        """Reads and checks a recipe.

        Args:
            source: a file (.yaml, .yml, .md with front matter, .json), a folder with a recipe.yaml, a text of several
                lines, or a Hub id.
            args: values for its variables: a mapping, JSON, or "name=value,name=value". The variables of a recipe in
                the mapping dialect need not be in it.
            compat: "sparseml" to behave as sparseml 1.8.0 does, with its faults.
            ignore_unknown: warn of modifiers and fields that are unknown or not supported, and pass them over.

        Raises:
            RecipeError: one line that names the recipe, line, modifier, field and value, and what would be right.
        """
        if isinstance(source, Recipe):
            document = copy.deepcopy(source.document)
            _override(document, parse_overrides(args), source.name)
            ignore_unknown = ignore_unknown or source.ignore_unknown
            return cls(document, name=source.name, compat=compat or source.compat, ignore_unknown=ignore_unknown)
        text = read_source(source)
        try:
            document = parse_document(front_matter(text), text.name)
            _override(document, parse_overrides(args), text.name)
            return cls(document, name=text.name, compat=compat, ignore_unknown=ignore_unknown)
        except RecursionError:
            raise RecipeError("its variables or values are nested too deep", recipe=text.name) from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.document == other.document

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Recipe({self.name!r}, {len(self.modifiers)} modifiers)"

    # Reading

    def _make(self, stage: Stage, entry: Entry) -> Modifier | None:
        try:
            cls = find_modifier(entry.type_name)
        except KeyError as error:
            self._complain(
                RecipeError(str(error.args[0]), recipe=self.name, line=entry.line, modifier=entry.type_name)
            )
            return None
        if cls.unsupported and self.ignore_unknown:
            logger.warning("%s: %s %s; it is passed over", self._where(entry.line), entry.type_name, cls.unsupported)
            return None
        fields = self._fields(cls, stage, entry)
        while True:
            try:
                modifier = cls(**fields)
                modifier.one_shot = stage.one_shot
                modifier.check_one_shot()
                return modifier
            except FieldError as error:
                wrong = self._error(entry, error, fields)
                if not (self.ignore_unknown and error.field in fields and error.field not in cls.fields):
                    raise wrong from None
                self._complain(wrong)
                del fields[error.field]

    def _fields(self, cls: type[Modifier], stage: Stage, entry: Entry) -> dict[str, Any]:
        """The fields with expressions computed, under the names of the flat dialect."""
        variables = Variables(self.document.variables | stage.variables)
        fields = {}
        for name, value in entry.fields.items():
            if name in _DROPPED and name not in cls.fields:
                logger.warning("%s: %s.%s has no effect", self._where(entry.lines.get(name)), entry.type_name, name)
                continue
            try:
                resolved = variables.resolve(value)
            except ExpressionError as error:
                raise RecipeError(
                    str(error), recipe=self.name, line=entry.lines.get(name), modifier=entry.type_name, field=name,
                    value=value,
                ) from None  # fmt: skip
            known = self.document.dialect == "new" and not cls.unsupported
            fields[_NEW_NAMES.get(name, name) if known else name] = resolved
        if self.document.dialect == "new" and not cls.unsupported:
            _complete(cls, fields, stage)
        return fields

    def _error(self, entry: Entry, error: FieldError, fields: dict[str, Any]) -> RecipeError:
        # The line of the field as the recipe calls it, of the modifier if a field is missing.
        written = {_NEW_NAMES.get(name, name): line for name, line in entry.lines.items()}
        line = entry.line if error.field is None else written.get(error.field, entry.line)
        return RecipeError(
            error.message, recipe=self.name, line=line, modifier=entry.type_name, field=error.field,
            value=fields.get(error.field or ""),
        )  # fmt: skip

    def _complain(self, error: RecipeError) -> None:
        if not self.ignore_unknown:
            raise error
        logger.warning("%s; it is passed over", error)

    def _where(self, line: int | None) -> str:
        return self.name if line is None else f"{self.name}, line {line}"

    def blame(self, modifier: Modifier, error: FieldError | ValueError) -> RecipeError:
        """The error of a modifier at its work, with the line that it stands on."""
        entry = self._lines[modifier.owner]
        if isinstance(error, FieldError):
            return self._error(entry, error, modifier.given)
        return RecipeError(str(error), recipe=self.name, line=entry.line, modifier=modifier.type_name)

    # What it asks for

    @property
    def max_epochs(self) -> int:
        """How many epochs a training with this recipe lasts: the last start or end, rounded up."""
        ends = [epoch for m in self.modifiers for epoch in (m.timing.start, m.timing.end) if epoch != NEVER]
        return max((math.ceil(epoch) for epoch in ends), default=0)

    def without_learning_rates(self) -> "Recipe":
        """The recipe without the modifiers that set the learning rate."""
        document = copy.deepcopy(self.document)
        for group in (group for stage in document.stages for group in stage.groups):
            group.entries = [entry for entry in group.entries if not _sets_learning_rate(entry)]
        for stage in document.stages:
            stage.groups = [group for group in stage.groups if group.entries]
        return Recipe(document, name=self.name, compat=self.compat, ignore_unknown=self.ignore_unknown)

    @property
    def sets_learning_rate(self) -> bool:
        return any(isinstance(modifier, LearningRateModifierBase) for modifier in self.modifiers)

    def check_names(self, model: nn.Module) -> set[str]:
        """Names of all weights that its modifiers hold to masks.

        Raises:
            RecipeError: a modifier names weights that the model lacks.
        """
        return self._weights(model, lambda modifier: True)

    def pruned_weights(self, model: nn.Module) -> set[str]:
        """Names of the weights that a modifier prunes at some time, not of those whose zeros it only keeps.

        Raises:
            RecipeError: a modifier names weights that the model lacks.
        """
        return self._weights(model, lambda modifier: modifier.completes)

    def _weights(self, model: nn.Module, chosen: Callable[[Modifier], bool]) -> set[str]:
        names: set[str] = set()
        for modifier in self.modifiers:
            if isinstance(modifier, MaskedTargets) and chosen(modifier) and not modifier.unsupported:
                try:
                    names |= modifier.find_targets(model).keys()
                except FieldError as error:
                    raise self.blame(modifier, error) from None
        return names

    def fresh_modifiers(self) -> list[Modifier]:
        """Copies of the modifiers for one training, which keep its state."""
        fresh = [copy.copy(modifier) for modifier in self.modifiers]
        for modifier in fresh:
            modifier.phase = Phase()
        return fresh

    def check_supported(self) -> None:
        """Makes sure that all modifiers run here.

        Raises:
            RecipeError: one does not, why, and what to do.
        """
        for modifier in self.modifiers:
            if modifier.unsupported:
                entry = self._lines[modifier.owner]
                raise RecipeError(modifier.unsupported, recipe=self.name, line=entry.line, modifier=entry.type_name)

    # Writing

    def dump(self) -> str:
        """The text of the recipe, which loads to an equal one: same dialect, order, variables and expressions."""
        return dump_document(self.document)

    def save(self, path: str | Path) -> None:
        """Writes `dump()` to a file."""
        with replacing(path) as temporary:
            temporary.write_text(self.dump(), encoding="utf-8")

    def at_once(self) -> "Recipe":
        """A recipe that does at its first step what this one's one-shot stages do, or all of it if it has none.

        Raises:
            RecipeError: a modifier prunes by what only training shows.
        """
        document = copy.deepcopy(self.document)
        document.stages = [stage for stage in document.stages if stage.one_shot] or document.stages
        for stage in document.stages:
            stage.run_type = "oneshot"
        return Recipe(document, name=self.name, compat=self.compat, ignore_unknown=self.ignore_unknown)

    def to_flat(self) -> "Recipe":
        """The recipe in the flat dialect, with variables and expressions replaced by their values.

        Raises:
            RecipeError: it has a one-shot stage, for which that dialect has no words.
        """
        if shot := next((stage for stage in self.document.stages if stage.one_shot), None):
            raise RecipeError(f"has the one-shot stage {shot.name!r}, which only mappings can say", recipe=self.name)
        groups = [Group(name, list(entries)) for name, entries in self._flat_groups()]
        document = Document("flat", [Stage("", groups)], {}, {})
        return Recipe(document, name=self.name, compat=self.compat, ignore_unknown=self.ignore_unknown)

    def _flat_groups(self) -> Iterator[tuple[str, list[Entry]]]:
        for stage in self.document.stages:
            for group in stage.groups:
                entries = []
                for entry in group.entries:
                    made = next((m for m in self.modifiers if self._lines[m.owner] is entry), None)
                    if made is not None:
                        entries.append(replace(entry, fields=dict(made.given), lines={}))
                if entries:
                    name = f"{stage.name}_{group.name}" if stage.name else group.name
                    yield name, entries


def _sets_learning_rate(entry: Entry) -> bool:
    try:
        return issubclass(find_modifier(entry.type_name), LearningRateModifierBase)
    except KeyError:
        return False


def _complete(cls: type[Modifier], fields: dict[str, Any], stage: Stage) -> None:
    """Defaults that the mapping dialect has and the flat one has not."""
    if fields.get("scheduler_args") == {}:
        del fields["scheduler_args"]
    if fields.pop("apply_globally", False):
        fields["scope"] = "global"
    defaults = {"start_epoch": NEVER, "update_frequency": NEVER}
    if stage.one_shot:
        defaults["end_epoch"] = 1.0  # of which nothing is read
    for name, default in defaults.items():
        if name in cls.fields and cls.fields[name].required:
            fields.setdefault(name, default)


def _override(document: Document, values: Mapping[str, Any], recipe: str) -> None:
    """Replaces variables, those of stages as well."""
    for name, value in values.items():
        scopes = [document.variables, *(stage.variables for stage in document.stages)]
        chosen = [scope for scope in scopes if name in scope]
        if not chosen and document.dialect == "new":
            chosen = scopes[:1]  # where arguments need not be declared
        if not chosen:
            known = list(dict.fromkeys(name for scope in scopes for name in scope))
            listed = f"its variables are {', '.join(known)}" if known else "it has none"
            raise RecipeError(f"has no variable {name!r} to set; {listed}", recipe=recipe)
        for scope in chosen:
            scope[name] = value
