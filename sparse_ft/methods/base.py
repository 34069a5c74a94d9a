"""What all modifiers share.

A method is a folder here with a class for each of its modifiers: a docstring, declared fields, `@register` with the
name that recipes use, and what it does when its time comes. Nothing else has to know of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from dataclasses import field as field_of_class
from typing import Any, ClassVar

from torch import Tensor

from .clock import Clock, Phase, Timing
from .fields import EPOCH, NEVER, Field, FieldError, field, read_fields
from .training import Training


@dataclass(frozen=True)
class Forward:
    """What a training has computed of a batch.

    Attributes:
        loss: of the labels.
        outputs, inputs: of the model.
        scale: of terms that are averages over a batch, where the loss is one over several.
        again: gives the loss of the labels by another forward pass on the same batch; None if the training has none.
        taught: what a teacher said of the batch, by the names of the inputs that it got: asked once for all modifiers.
    """

    loss: Tensor
    outputs: Any
    inputs: Any
    scale: float = 1.0
    again: Callable[[], Tensor] | None = None
    taught: dict[tuple[str, ...], Any] = field_of_class(default_factory=dict)

    def need_again(self) -> Tensor:
        """The loss by another forward pass.

        Raises:
            ValueError: the training cannot give it.
        """
        if self.again is None:
            raise ValueError(
                "needs the loss of the same batch more than once: call session.loss(loss, outputs, inputs, again=f), "
                "where f() computes the loss by another forward pass"
            )
        return self.again()


class Modifier:
    """One entry of a recipe: fields that are checked when it is made, and what it does to a training.

    Sub-classes declare fields as class attributes (`field(...)`); the instance has the values. They override what
    they need of `start`, `update`, `end`, `before_step` and `after_step`. All of these are called after the backward
    pass and before the optimizer's step, `after_step` after it.

    Raises:
        FieldError: on construction, for a field that is unknown, wrong or missing.

    Attributes:
        given: the fields as they were given, without defaults.
        owner: its place in the recipe, under which it holds masks.
        phase: how far it is in the training.
    """

    type_name: ClassVar[str] = ""
    fields: ClassVar[dict[str, Field]] = {}
    source: ClassVar[str] = ""  # the paper, or where the definition comes from
    unsupported: ClassVar[str] = ""  # why this project does not run it, and what to do instead
    periodic: ClassVar[bool] = False  # updates every `update_frequency` epochs
    completes: ClassVar[bool] = False  # see Timing
    changes_loss: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False
    one_shot = False  # of a one-shot stage: all at the first step, whatever its fields say of time

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        declared: dict[str, Field] = {}
        for base in reversed(cls.__mro__):
            for name, value in vars(base).items():
                if isinstance(value, Field):
                    declared[name] = value
                elif name in declared:
                    del declared[name]  # a sub-class has overridden the field by a fixed value
        cls.fields = declared

    def __init__(self, **values: Any):
        self.given = dict(values)
        self.owner = -1
        self.phase = Phase()
        for name, value in read_fields(self.type_name, self.fields, values).items():
            setattr(self, name, value)
        self.check()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other)["given"] == self.given

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self.type_name}({', '.join(f'{name}={value!r}' for name, value in self.given.items())})"

    def check(self) -> None:
        """Finds fields that contradict each other; see `wrong`."""

    def wrong(self, name: str | None, message: str) -> FieldError:
        """The error to raise for a field."""
        return FieldError(self.type_name, name, message)

    def check_one_shot(self) -> None:
        """Finds a modifier that cannot be of a one-shot stage; see `wrong`."""

    @property
    def timing(self) -> Timing:
        """When it is due."""
        if self.one_shot:
            return Timing(NEVER, 0.0, None, self.completes)
        every = getattr(self, "update_frequency", None) if self.periodic else None
        start, end = getattr(self, "start_epoch", NEVER), getattr(self, "end_epoch", NEVER)
        return Timing(start, end, every, self.completes)

    # What a training asks for

    def start(self, training: Training) -> None:
        """At its first step, before `update`."""

    def update(self, training: Training) -> None:
        """At its first and its last step, and at each update between."""

    def end(self, training: Training) -> None:
        """At its last step, after `update`; not called where the end is never."""

    def before_step(self, training: Training) -> None:
        """At every step from its first to its last, after `update`."""

    def after_step(self, training: Training) -> None:
        """After every optimizer step from its first to its last."""

    def listen(self, training: Training) -> None:
        """Before the first forward pass: the place to hook into those of the model."""

    def loss(self, training: Training, loss: Tensor, forward: Forward) -> Tensor:
        """The loss to train on, of a step from its first to its last; for modifiers with `changes_loss`.

        Args:
            loss: what modifiers before this one made of `forward.loss`.
        """
        return loss

    def stop_listening(self) -> None:
        """At the end of the training."""

    def resume(self, training: Training) -> None:
        """After `load_state_dict`, in the middle of its time: bring about again what no checkpoint keeps."""

    def wants_dense_gradients(self, training: Training, step: int) -> bool:
        """Whether the gradients of that step have to reach pruned weights, which then train."""
        return False

    def watches_gradients(self, training: Training, step: int) -> bool:
        """Whether it looks at gradients of pruned weights at that step; see `WeightMasks.gradient`."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What it has to remember besides its masks: tensors, and values that JSON can hold."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""

    # What can be told of a recipe without a model

    def preview(self, clock: Clock, step: int) -> dict[str, float]:
        """What it sets at a step of its time, by quantity: "sparsity", "learning rate", "weight decay"."""
        return {}

    def unfinished(self, training: Training) -> str:
        """What is missing if training ends now, or nothing."""
        return ""


class Scheduled(Modifier):
    """A modifier with a start and an end that are to be given."""

    start_epoch: float = field(EPOCH, unit="epochs", doc="When it begins; -1 for at once.")
    end_epoch: float = field(EPOCH, unit="epochs", doc="When it ends; -1 for never.")

    def check(self) -> None:
        if self.end_epoch != NEVER and self.end_epoch < self.start_epoch:
            raise self.wrong(
                "end_epoch", f"must not be before start_epoch ({self.start_epoch:g}), is {self.end_epoch:g}"
            )


class Bounded(Scheduled):
    """One that ends after it has begun: what it does is spread over the time between, or becomes final at its end."""

    def check(self) -> None:
        super().check()
        if self.end_epoch == NEVER or self.end_epoch <= self.start_epoch:
            raise self.wrong(
                "end_epoch", f"must be an epoch after start_epoch ({self.start_epoch:g}), not {self.end_epoch:g}"
            )


class Unsupported(Modifier):
    """A modifier that recipes contain and this project does not run: it is parsed, kept, and reported.

    Its fields, of several generations of formats, are kept as they are.
    """

    def __init__(self, **values: Any):
        super().__init__()
        self.given = dict(values)
