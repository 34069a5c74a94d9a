"""An output that waits to see what follows: a batch norm's here, a convolution's in pending_conv.py.

What follows a norm (a residual is added, an activation applied) belongs to the same pass over memory, but the norm's
module cannot know it: the model's own code does it, in its own words. So the norm gives a tensor that is not computed
yet. What adds to it or activates it joins the same pass; whatever else looks at it gets the plain result. A sparse
convolution takes an activated norm unfinished: it normalises what it reads, forward and for its weight gradient, so
that the activation is neither written nor kept.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sparse_ft.ops import Activation, batch_last_strides
from sparse_ft.ops._native import versions_of
from sparse_ft.ops.gradients import batch_norm, batch_norm_backward
from sparse_ft.ops.statistics import reciprocal_deviation


def _getter(name: str) -> Callable[[Tensor], Any]:
    return getattr(Tensor, name).__get__  # as `__torch_function__` is given it


_GRAD_FN, _REQUIRES_GRAD = _getter("grad_fn"), _getter("requires_grad")
_SET_HOOKS = Tensor._backward_hooks.__set__  # type: ignore[union-attr]  # done to a tensor that moves in the graph


def _version(tensor: Tensor) -> int | None:
    try:
        return tensor._version
    except RuntimeError:  # made in inference mode, as a parameter may have been
        return None


_FEWEST_SAMPLES = 16  # a convolution that reads fewer at a time computes value by value what a norm does by vectors
# A smaller activation stays in the caches, where writing and reading it costs less than computing it twice.
FEWEST_VALUES = 1 << 20


class Patience:
    """Whether a norm leaves its activation unfinished: as long as one convolution takes it, and nobody else wants it;
    and whether a convolution waits for a norm.

    Learned from what becomes of the outputs: once an unfinished one was wanted by others, it is lost for good.
    """

    def __init__(self) -> None:
        self.lost = False
        self.read_alone = False  # a depthwise convolution has read the activation, and nobody else

    def lasts(self, x: Tensor) -> bool:
        """Whether the activated norm of `x` is to wait."""
        # Who keeps what is saved for backward by other means (a checkpoint) counts on the same steps in a repetition.
        saved_plainly = torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        worthwhile = x.shape[0] >= _FEWEST_SAMPLES and x.numel() >= FEWEST_VALUES
        return not self.lost and saved_plainly and worthwhile

    def lose(self) -> None:
        self.lost = True


class Pending(Protocol):
    """What is still to be computed for an output, of `shape`. It is not changed: who joins it makes a new one."""

    grad_enabled: bool  # the modes in which it was made, and is to be computed
    inference: bool
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    activation: Activation
    residual: Tensor | None

    def takes(self, residual: Tensor) -> bool:
        """Whether a tensor can be added. One without a count of its versions could change unseen."""

    def added(self, residual: Tensor) -> "Pending":
        """With what is added."""

    def activated(self, activation: Activation) -> "Pending | None":
        """With an activation at its end; None where it does not fit in."""

    def may_wait(self) -> bool:
        """Whether the activated output is to be left unfinished, too."""

    def looked_at(self) -> None:
        """Somebody wants the result as it is."""

    def check(self) -> None:
        """Raises where an operand is no longer what it was."""

    def compute(self) -> Tensor:
        """The result, differentiable."""

    def defer(self) -> "Deferred":
        """A tensor that stands for it."""


class Operands:
    """What a pending output is computed from, unless it has changed by then."""

    what = ""  # of what it is operands, for the error
    _seen: tuple[Tensor | None, ...] = ()
    _versions = b""  # of these, as they were seen

    def _see(self, *tensors: Tensor | None) -> None:
        self._seen += tensors
        self._versions += versions_of(*tensors)

    def _copy(self) -> Any:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def check(self) -> None:
        """Raises where an operand is no longer what it was."""
        if versions_of(*self._seen) != self._versions:
            raise RuntimeError(
                f"an input, parameter or statistic of {self.what}, or the tensor added to its output, was "
                "modified in place before the result was used; copy (.clone()) what is modified, or use the dense "
                "model (sparse_ft.to_dense)"
            )


class Origin(Protocol):
    """What a norm's input came from, with which the norm's gradient is computed."""

    def followed_by(self, norm: "PendingNorm") -> "Deferred":
        """A tensor that stands for the norm, in its place in the graph."""


class PendingNorm(Operands):
    """A norm's operands. The statistics are measured; `residual` is to be added."""

    what = "a batch norm"

    def __init__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float,
        training: bool, patience: Patience, activation: Activation, before: "Origin | None" = None,
    ):  # fmt: skip
        """`training`: the statistics are those of x; `patience`: of the norm's module; `before`: what x came from, if
        that goes back with the norm."""
        self.grad_enabled, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.shape, self.dtype, self.device = x.shape, x.dtype, x.device
        if not training:  # running statistics, which go on
            mean, variance = mean.clone(), variance.clone()
        self.x, self.weight, self.bias = self._constant(x), self._constant(weight), self._constant(bias)
        self.mean, self.variance, self.eps, self.training = mean, variance, eps, training
        self.patience, self.activation = patience, activation
        self.residual: Tensor | None = None
        self.taken = False  # by a convolution
        self.before = before
        self._see(self.x, self.weight, self.bias)

    @functools.cached_property
    def rstd(self) -> Tensor:
        """1 / standard deviation"""
        return reciprocal_deviation(self.variance, self.eps)

    def _constant(self, tensor: Any) -> Any:
        """Where no gradient is recorded, also if the norm is computed where one is."""
        return tensor if self.grad_enabled or tensor is None else tensor.detach()

    def operands(self) -> tuple:
        """(x, weight, bias, mean, 1 / standard deviation, activation), as a convolution takes them."""
        return self.x, self.weight, self.bias, self.mean, self.rstd, self.activation

    def compute(self) -> Tensor:
        """The norm with what follows it, differentiable."""
        self.check()
        if self.before is not None and torch.is_grad_enabled():
            deferred = self.defer()  # its place in the graph
            with torch.no_grad():
                deferred._value = self.compute()
            return result_of(deferred)
        return batch_norm(
            self.x, self.weight, self.bias, self.mean, self.variance, self.eps, self.residual, self.activation,
            self.training,
        )[0]  # fmt: skip

    def takes(self, residual: Tensor) -> bool:
        what = (residual.shape, residual.dtype, residual.device)
        return self.before is None and what == (self.shape, self.dtype, self.device) and not residual.is_inference()

    def added(self, residual: Tensor) -> "PendingNorm":
        other = self._copy()
        other.residual = self._constant(residual)
        other._see(other.residual)
        return other

    def activated(self, activation: Activation) -> "PendingNorm":
        other = self._copy()
        other.activation = activation
        return other

    def looked_at(self) -> None:
        if self.activation:
            self.patience.lose()

    def may_wait(self) -> bool:
        """Whether the activated output is to be left unfinished, too."""
        return self.residual is None and self.activation.cheap and self.patience.lasts(self.x)

    def defer(self) -> "Deferred":
        assert self.residual is None or self.activation is Activation.IDENTITY
        if self.before is None:
            deferred = _Defer.apply(self.x, self.weight, self.bias, self.residual, self)
        else:
            deferred = self.before.followed_by(self)
        return placed(deferred)


class _Defer(torch.autograd.Function):
    """Gives the deferred output its place in the graph, for what does not go by `__torch_function__`."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, pending):
        ctx.save_for_backward(x, weight, bias, pending.mean, pending.variance)
        ctx.set_materialize_grads(False)  # an activation in place leaves none for what was there before it
        ctx.activation, ctx.training, ctx.eps = pending.activation, pending.training, pending.eps
        return Deferred(pending)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, mean, variance = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if grad is None or not any(needs[:3]):
            return None, None, None, grad, None
        rstd = reciprocal_deviation(variance, ctx.eps)
        grads = batch_norm_backward(grad, x, weight, bias, mean, rstd, None, None, ctx.activation, ctx.training)
        grads = [grad if wanted else None for grad, wanted in zip(grads[:3], needs, strict=False)]
        return *grads, grad if needs[3] else None, None


class _Result(torch.autograd.Function):
    """From a deferred output to its plain tensor, along whatever history the deferred one has by now."""

    @staticmethod
    def forward(ctx, deferred):
        return deferred._value  # nobody has it yet: not a view of an input, so that it can be changed in place

    @staticmethod
    def backward(ctx, grad):
        return grad


class _Add(torch.autograd.Function):
    """The place in the graph of a deferred output to which something was added in place."""

    @staticmethod
    def forward(ctx, deferred, residual):
        ctx.mark_dirty(deferred)
        return deferred

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


class _Become(torch.autograd.Function):
    """The place in the graph of a deferred output that an operation in place has turned into `other`."""

    @staticmethod
    def forward(ctx, deferred, other):
        ctx.mark_dirty(deferred)
        return deferred

    @staticmethod
    def backward(ctx, grad):
        return None, grad


class Deferred(torch.Tensor):
    """An output that is not computed yet.

    Functions of torch see it by `__torch_function__`: a few are fused, all others get the plain result in its place.
    What calls into torch by other ways (a custom `torch.autograd.Function`, a module's backward hooks) meets a tensor
    with the right place in the graph and no memory, whose values come by `__torch_dispatch__`.
    """

    _pending: Pending
    _node: Any  # its place in the graph, as far as it is known here
    _value: Tensor | None  # the result, once it had to be computed
    _stands_for: Tensor | None  # the plain tensor that it has become: every look at it is a look at that
    _seen_version: int | None  # of that tensor, when its place in the graph was looked at last

    @staticmethod
    def __new__(cls, pending: Pending):
        shape = pending.shape
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=batch_last_strides(shape), dtype=pending.dtype, device=pending.device
        )
        self._pending, self._node, self._value, self._stands_for = pending, None, None, None
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (func in _METADATA and args[0]._stands_for is None) or func == _SET_HOOKS:
            return _own(func, *args, **kwargs)
        fused = None
        if func in _SUMS and len(args) == 2 and not kwargs:
            fused = _add(args[0], args[1], _SUMS[func])
        elif func in _ACTIVATIONS and args and isinstance(args[0], Deferred):
            call = _ACTIVATIONS[func](*args, **kwargs)
            fused = None if call is None else _activate(args[0], *call)
        if fused is not None:
            return fused
        seen: list[Deferred] = []

        def plain(deferred: Deferred) -> Tensor:
            seen.append(deferred)
            return result_of(deferred, func not in _METADATA)

        args, kwargs = tree_map_only(Deferred, plain, (args, kwargs))
        result = func(*args, **kwargs)
        for deferred in seen:
            _follow(deferred)
        return result

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        args, kwargs = tree_map_only(Deferred, _value_below_autograd, (args, kwargs or {}))
        return func(*args, **kwargs)


def _own(function, *args, **kwargs):
    """Asks the deferred tensor itself."""
    with torch._C.DisableTorchFunctionSubclass():
        return function(*args, **kwargs)


def placed(deferred: Deferred) -> Deferred:
    """Remembers the place in the graph that a deferred output was made at."""
    deferred._node = _own(_GRAD_FN, deferred)
    return deferred


def _has_another_history(deferred: Deferred) -> bool:
    """Whether a custom function has given it away as its own output."""
    return _own(_GRAD_FN, deferred) is not deferred._node


def _compute(deferred: Deferred) -> Tensor:
    if deferred._value is None:
        deferred._pending.looked_at()
        with torch.no_grad():
            deferred._value = deferred._pending.compute()
    return deferred._value


def result_of(deferred: Deferred, read: bool = True) -> Tensor:
    """The plain tensor that takes the deferred one's place, from now on; `read`: for its values, not for its shape."""
    now = deferred._stands_for
    if now is not None:
        if read:
            deferred._pending.looked_at()
        if not _has_another_history(deferred):
            return now
        deferred._value = now.detach()
    # Its place in the graph is that of the deferred one, whatever mode is on as it is computed.
    with torch.inference_mode(deferred._pending.inference):
        now = _compute(deferred)
        if _own(_REQUIRES_GRAD, deferred):
            with torch.enable_grad():
                now = _Result.apply(deferred)
    deferred._stands_for, deferred._seen_version, deferred._node = now, _version(now), _own(_GRAD_FN, deferred)
    return now


def _become(deferred: Deferred, other: Tensor) -> None:
    """After an operation in place all who hold the tensor see what it has become, by whatever way they look."""
    deferred._stands_for, deferred._seen_version = other, _version(other)
    if torch.is_grad_enabled() and (other.requires_grad or _own(_REQUIRES_GRAD, deferred)):
        _Become.apply(deferred, other)
        deferred._node = _own(_GRAD_FN, deferred)


def _follow(deferred: Deferred) -> None:
    """Notice that the plain tensor was changed in place."""
    now = deferred._stands_for
    if now is not None and _version(now) != deferred._seen_version:
        _become(deferred, now)


def _value_below_autograd(deferred: Deferred) -> Tensor:
    now = deferred._stands_for
    if now is None:
        return _compute(deferred)
    if _version(now) != deferred._seen_version and _own(_REQUIRES_GRAD, deferred):
        raise RuntimeError(
            "a batch norm's output was modified in place by way of a view; clone it before (.clone()), or use the "
            "dense model (sparse_ft.to_dense)"
        )
    return now


def pending_of(tensor: Any) -> Pending | None:
    """What is still to be computed, if nothing has become of it yet and gradients are recorded as they were."""
    if (
        isinstance(tensor, Deferred)
        and tensor._stands_for is None
        and tensor._pending.grad_enabled == torch.is_grad_enabled()
        and tensor._pending.inference == torch.is_inference_mode_enabled()
        and not _has_another_history(tensor)
    ):
        return tensor._pending
    return None


def _activate(deferred: Deferred, activation: Activation, in_place: bool) -> Tensor | None:
    pending = pending_of(deferred)
    if pending is None or pending.activation:
        return None
    activated = pending.activated(activation)
    if activated is None:
        return None
    if not activated.may_wait():
        result = activated.compute()
        if in_place:
            _become(deferred, result)
        return result
    pending.check()
    waiting = activated.defer()
    if not in_place:
        return waiting
    if _own(_REQUIRES_GRAD, waiting):
        _Become.apply(deferred, waiting)
    deferred._pending, deferred._node, deferred._value = activated, _own(_GRAD_FN, deferred), None
    return deferred


def finish(deferred: Deferred) -> Tensor:
    """`result_of` for one who may take it unfinished another time."""
    if deferred._value is None:
        with torch.inference_mode(deferred._pending.inference), torch.no_grad():
            deferred._value = deferred._pending.compute()
    return result_of(deferred)


def take_unfinished(x: Tensor) -> PendingNorm | None:
    """The activated norm that `x` stands for, for one who computes it on the way; None where `x` is a tensor.

    The first to ask gets it. Whoever comes later finds a tensor.
    """
    pending = pending_of(x)
    if not isinstance(pending, PendingNorm) or not pending.activation:
        return None
    if pending.taken or not pending.patience.lasts(pending.x):
        pending.patience.lose()
        return None
    pending.check()
    pending.taken = True
    return pending


def take_alone(x: Deferred) -> tuple[PendingNorm | None, Tensor]:
    """The activated norm that `x` stands for, for one whose gradient goes past the activation's own place in the graph
    to the norm's operands; else None and the activation, which is finished where it is to be taken another time.

    Another reader's gradient would be right, too, but rounded in another order. So it is seen first whether there is
    any.
    """
    pending = pending_of(x)
    if not isinstance(pending, PendingNorm) or not pending.activation or not pending.grad_enabled:
        return None, x
    if pending.before is not None:  # its operands have no place in the graph
        return None, x
    if not pending.patience.read_alone:
        pending.patience.read_alone = True
        return None, finish(x)
    return take_unfinished(x), x


def _add(a: Any, b: Any, in_place: bool) -> Tensor | None:
    for deferred, residual in ((a, b),) if in_place else ((a, b), (b, a)):
        pending = pending_of(deferred)
        if pending is None or pending.residual is not None or pending.activation or deferred is residual:
            continue
        if isinstance(residual, Deferred):
            if tuple(residual._pending.shape) != tuple(pending.shape):
                continue
            residual = result_of(residual)
        if type(residual) is not Tensor or not pending.takes(residual):
            continue
        pending.check()
        added = pending.added(residual)
        if not in_place:
            return added.defer()
        if torch.is_grad_enabled():
            _Add.apply(deferred, residual)
        deferred._pending, deferred._node, deferred._value = added, _own(_GRAD_FN, deferred), None
        return deferred
    return None


_METADATA = {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point,
    torch.is_floating_point, torch.numel, Tensor.__len__,
    *map(_getter, ("shape", "ndim", "dtype", "device", "layout", "requires_grad", "grad_fn", "is_leaf")),
    *map(_getter, ("is_cpu", "is_cuda")),
}  # fmt: skip

# Function -> whether it changes its first argument.
_SUMS = {
    torch.add: False, Tensor.add: False, Tensor.__add__: False, Tensor.__radd__: False,
    Tensor.add_: True, Tensor.__iadd__: True,
}  # fmt: skip


def _plain_call(activation: Activation, in_place: bool = False):
    def read(x):
        return activation, in_place

    return read


def _functional_call(activation: Activation):
    def read(input, inplace=False):
        return activation, inplace

    return read


def _hardtanh_call(input, min_val=-1.0, max_val=1.0, inplace=False):
    return (Activation.RELU6, inplace) if (min_val, max_val) == (0, 6) else None


def _gelu_call(input, *, approximate="none"):
    return (Activation.GELU if approximate == "none" else Activation.GELU_TANH), False


# Function -> what a call of it means: the activation, and whether it is in place; None: nothing that can be fused.
_ACTIVATIONS = {
    torch.relu: _plain_call(Activation.RELU),
    Tensor.relu: _plain_call(Activation.RELU),
    torch.relu_: _plain_call(Activation.RELU, in_place=True),
    Tensor.relu_: _plain_call(Activation.RELU, in_place=True),
    F.relu: _functional_call(Activation.RELU),
    F.relu6: _functional_call(Activation.RELU6),
    F.silu: _functional_call(Activation.SILU),
    F.hardswish: _functional_call(Activation.HARDSWISH),
    F.hardtanh: _hardtanh_call,
    F.gelu: _gelu_call,
}
