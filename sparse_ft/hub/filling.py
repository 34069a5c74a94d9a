"""timm models that are built to be filled at once: no random numbers are drawn, and no weight is copied needlessly.

Drawing and writing the numbers that a file replaces takes longer than reading the file, and timm copies all settings
of a model twice, the state dict among them.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DRAW = {Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_}
_SHAPE = {Tensor.erfinv_, Tensor.mul_, Tensor.add_, Tensor.clamp_}  # what makes a truncated normal of a uniform draw


class Filling(TorchFunctionMode):
    """While it is entered, parameters stay as they were allocated where they would be filled at random, and the
    tensors of a state dict are not copied but into a model.

    Args:
        state_dict: What the model is filled with.
    """

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._given = {id(tensor): tensor for tensor in state_dict.values()}
        self._skipped: dict[int, Tensor] = {}
        self._copied: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else kwargs.get("tensor")
        if isinstance(first, nn.Parameter):
            if func in _DRAW or (func in _SHAPE and id(first) in self._skipped):
                self._skipped[id(first)] = first
                return first
            if func is Tensor.copy_:
                self._copied[id(first)] = first
        elif func is Tensor.__deepcopy__ and id(first) in self._given:
            return first
        return func(*args, **kwargs)

    def unfilled(self, model: nn.Module) -> list[str]:
        """Names of the model's parameters that have not been loaded: they may hold whatever was in memory."""
        assigned = {tensor.data_ptr() for tensor in self._given.values()}
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.numel() and id(parameter) not in self._copied and parameter.data_ptr() not in assigned
        ]


class Handed(dict[str, Tensor]):
    """A state dict whose tensors `nn.Module.load_state_dict` makes the model's own instead of copying them.

    A plain dict that is made of it on the way is copied, as ever.
    """

    class _EachModule:
        """Stands for what torch keeps of each module beside its tensors: the entry by which it assigns."""

        def get(self, module: str, default: Any = None) -> dict[str, Any]:
            return {"assign_to_params_buffers": True}

    _metadata = _EachModule()
