"""What SparseLinear and SparseConv2d share: values under a pattern, and a dense face to the outside."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparse_ft.ops import SparsePattern, native_reason

logger = logging.getLogger(__name__)

_values_alone: ContextVar[bool] = ContextVar("values_alone", default=False)


def parameter_of(module: nn.Module, name: str) -> Any:
    """`module.name` without the module's own, slow `__getattr__`, where it is what it was registered as."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def in_autocast_dtype(x: Tensor) -> Tensor:
    """An input as torch's own layers take it: under autocast in the type of that, otherwise as it is."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return x
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype) if x.is_floating_point() and x.dtype not in (dtype, torch.float64) else x


class SparseModule(nn.Module):
    """A layer whose trainable weight is the vector of its nonzeros.

    Under autocast the input is taken in its lower type, as torch's layers do; weight and bias stay as they are.

    `weight` has shape (nnz, 1): gradients, optimizer state and all-reduce traffic shrink with the density,
    and a frozen mask cannot regrow. It has two dimensions so that rules which spare one-dimensional
    parameters from weight decay (timm's, for one) treat it as the matrix that it is.

    `state_dict()` gives, and `load_state_dict()` takes, the dense weight under the dense key. As with any module,
    what is written into a tensor of the state dict in place becomes the weight.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    pattern: SparsePattern
    stored_transposed = False  # the dense weight of transformers' Conv1D is (in, out)

    def _set_weight(self, pattern: SparsePattern, values: Tensor, bias: Tensor | None, like: Tensor) -> None:
        self.pattern = pattern
        self.weight = nn.Parameter(values.reshape(-1, 1), requires_grad=like.requires_grad)
        self.register_parameter("bias", cast(nn.Parameter | None, bias))
        self._runs_natively: tuple[torch.dtype, torch.dtype] | None = None  # types of input and weight, as was seen
        self._reported = False  # that others do not
        self._given: tuple[Tensor, int, int] | None = None  # see _give

    @property
    def dense_shape(self) -> torch.Size:
        """Shape of the dense weight, as the dense layer stores it."""
        return torch.Size(reversed(self.pattern.shape) if self.stored_transposed else self.pattern.shape)

    @property
    def nnz(self) -> int:
        """Number of trained weights."""
        return self.pattern.nnz

    @property
    def sparsity(self) -> float:
        """Fraction of the dense weight that is outside the pattern."""
        return 1.0 - self.nnz / max(1, self.dense_shape.numel())

    def to_dense(self) -> nn.Module:
        """The exact dense layer; the bias is shared."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        """A dense copy of the weight, in `dense_shape`."""
        self._take_back()
        dense = self.pattern.to_dense(self.weight.detach())
        return dense.t().contiguous() if self.stored_transposed else dense

    def mask(self) -> Tensor:
        """bool, `dense_shape`: True at the pattern's positions, also where the value is 0.0 at present."""
        mask = self.pattern.mask()
        return mask.t().contiguous() if self.stored_transposed else mask

    def native_reason(self, x: Tensor | None = None) -> str | None:
        """None if the layer (given input `x`) runs on the native kernels, otherwise why not."""
        return native_reason(x, weights=(parameter_of(self, "weight"), parameter_of(self, "bias")))

    def _give(self) -> Tensor:
        """The dense weight for a state dict.

        It is a copy, but users of state dicts write through them: timm's ModelEma averages that way. So the copy is
        remembered until the layer is next used, which takes over what has been written until then.
        """
        dense = self.dense_weight()
        if not dense.is_inference():  # such a tensor cannot be written in place later
            self._given = dense, dense._version, self.weight._version
        return dense

    def _take_back(self) -> None:
        if self._given is not None:
            self._write_back()

    @torch.no_grad()
    def _write_back(self) -> None:
        assert self._given is not None
        (dense, version, weight_version), self._given = self._given, None
        if dense._version == version or self.weight._version != weight_version:
            return  # as it was given, or out of date
        oriented = dense.t() if self.stored_transposed else dense
        self.weight.copy_(self.pattern.from_dense(oriented).reshape(-1, 1))

    def __getstate__(self):
        self._take_back()  # a copy of the layer is not written through the original's state dict
        return self.__dict__.copy()

    def _before_forward(self, x: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        self._take_back()
        types = x.dtype, parameter_of(self, "weight").dtype
        if types == self._runs_natively or self._reported or x.device.type != "cpu":
            return
        reason = self.native_reason(x)
        if not reason:
            self._runs_natively = types
        else:
            self._reported = True
            logger.warning("%s runs on the reference backend, which is slow: %s", self, reason)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not _values_alone.get():
            destination[prefix + "weight"] = self._give()

    @staticmethod
    @contextmanager
    def values_in_state_dict() -> Iterator[None]:
        """While the block runs, state dicts hold the values (nnz, 1) under the dense keys: for who asks each layer
        for its `dense_weight` in turn."""
        token = _values_alone.set(True)
        try:
            yield
        finally:
            _values_alone.reset(token)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        key = prefix + "weight"
        dense = state_dict.get(key)
        if dense is not None:
            if dense.shape != self.dense_shape:
                errors.append(
                    f"size mismatch for {key}: the checkpoint has shape {tuple(dense.shape)}, "
                    f"the layer {tuple(self.dense_shape)}."
                )
                return
            oriented = dense.t() if self.stored_transposed else dense
            values = self.pattern.from_dense(oriented).reshape(-1, 1)
            outside = int(torch.count_nonzero(dense)) - int(torch.count_nonzero(values))
            if outside:
                errors.append(
                    f"{key}: {outside} nonzero weights of the checkpoint lie outside the layer's mask and would be "
                    f"lost; load the checkpoint into the dense model (sparse_ft.to_dense), then convert it again."
                )
                return
            state_dict[key] = values
        try:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        finally:
            if dense is not None:
                state_dict[key] = dense
