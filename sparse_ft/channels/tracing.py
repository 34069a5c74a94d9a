"""Which channels of a model belong together, found by watching one forward pass.

Every output channel of a convolution and of a linear layer gets a number, and the numbers follow the data through the
operations that the model performs, whatever its code looks like. An addition makes the channels that it adds one; a
concatenation puts numbers one after another; a flattening repeats them; a norm goes along with the channel; a grouped
convolution (depthwise is the case of one channel a group) makes all channels of a group one. What depends on a channel
in any other way (an output of the model, a layer norm, attention, an operation not known here) fixes it: it can never
be left out. So what is not understood costs possibilities, and never correctness.

The channels that are one in this sense are a *unit*: they can only be left out together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from sparse_ft.steps import call

from .units import FIXED, Channels, Place

aten = torch.ops.aten


def trace_channels(model: nn.Module, inputs: Any) -> Channels:
    """Follows one forward pass; the model is in evaluation mode already."""
    tracer = _Tracer(model)
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(tracer.before_linear))
            hooks.append(module.register_forward_hook(tracer.after_linear(name), always_call=True))
    try:
        with tracer:
            outputs = call(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for output in tensors_of(outputs):
        tracer.fix(output)
    return tracer.channels()


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class _Label:
    """What is known of a tensor: the node of each slice along dimension `dim`.

    zero: whether the slice of a channel that is left out would be zero.
    """

    dim: int
    nodes: list[int]
    zero: bool = True


class _Nodes:
    """Channels, and which of them are one (union-find); node 0 is what is fixed."""

    def __init__(self) -> None:
        self._parent = [0]

    def fresh(self, count: int) -> list[int]:
        first = len(self._parent)
        nodes = list(range(first, first + count))
        self._parent += nodes
        return nodes

    def root(self, node: int) -> int:
        parent = self._parent
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def join(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        self._parent[max(a, b)] = min(a, b)

    def fix(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            self.join(node, 0)

    def join_all(self, first: Sequence[int], second: Sequence[int]) -> None:
        if first is not second:
            for a, b in zip(first, second, strict=True):
                self.join(a, b)


# Elementwise, although torch does not tag them so.
_UNTAGGED = {aten.hardswish, aten.hardswish_, aten._to_copy, aten.detach, aten.alias, aten.lift_fresh}
_VIEWS = {
    aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.squeeze, aten.squeeze_, aten.unsqueeze,
    aten.unsqueeze_, aten.expand, aten.flatten,
}  # fmt: skip
_SLICES = {aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.narrow, aten.unbind}
_REDUCTIONS = {aten.mean, aten.sum, aten.amax, aten.amin}
# Over the last dimensions, each channel for itself.
_SPATIAL = {
    aten.max_pool2d_with_indices, aten.max_pool2d, aten.avg_pool2d, aten._adaptive_avg_pool2d,
    aten.adaptive_max_pool2d, aten.avg_pool1d, aten.max_pool1d, aten._adaptive_avg_pool3d, aten.avg_pool3d,
    aten.max_pool3d_with_indices, aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d,
    aten.reflection_pad1d, aten.reflection_pad2d, aten.replication_pad1d, aten.replication_pad2d,
}  # fmt: skip


class _Tracer(TorchDispatchMode):
    """Follows channels through the operations of a forward pass."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._nodes = _Nodes()
        self._labels = WeakIdKeyDictionary()
        self._inside_linear = 0
        self._owners: dict[int, list[tuple[str, str, nn.Module]]] = {}
        for name, module in model.named_modules():
            for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    self._owners.setdefault(id(tensor), []).append((name, key, module))
        self._places: dict[tuple[str, str], tuple[str, list[int], list[int] | None]] = {}
        self._groups: dict[str, list[int]] = {}

    # Linear layers: torch takes them apart into views and products, so they are followed as modules.

    def before_linear(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inside_linear += 1

    def after_linear(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Linear, args: tuple[Any, ...], output: Any) -> None:
            self._inside_linear -= 1
            if not isinstance(output, Tensor):
                return  # it raised
            x = args[0]
            nodes = self._reads(x, x.dim() - 1, module.in_features)
            out = self._makes(module.weight, module.out_features, nodes)
            self._place(module.bias, "bias", out)
            self._labels[output] = _Label(output.dim() - 1, out)

        return hook

    # Operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if not self._inside_linear:
            self._follow(func, args, kwargs, output)
        return output

    def _follow(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        packet = func.overloadpacket
        given = tensors_of((args, kwargs))
        if packet is aten.convolution:
            self._convolution(args, output)
        elif func.namespace == "aten" and "batch_norm" in packet.__name__:
            self._norm(args, output)
        elif not any(tensor in self._labels for tensor in given):
            return
        elif torch.Tag.pointwise in func.tags or packet in _UNTAGGED:
            self._pointwise(func, args, kwargs, given, output)
        else:
            rule = self._rule(packet)
            label = rule(self._labels[args[0]], args, kwargs, output) if rule and self._only_first(given) else None
            if packet is aten.cat:
                label = self._concatenated(args, kwargs, output)
            if label is None:
                for tensor in given:
                    self.fix(tensor)
                return
            for tensor in tensors_of(output):
                self._labels[tensor] = label

    def _only_first(self, given: list[Tensor]) -> bool:
        return given[0] in self._labels and not any(tensor in self._labels for tensor in given[1:])

    def _rule(self, packet: Any) -> Callable[..., _Label | None] | None:
        if packet in _VIEWS:
            return _viewed
        if packet in _SLICES:
            return _sliced
        if packet in _REDUCTIONS:
            return _reduced
        if packet in _SPATIAL:
            return lambda label, args, kwargs, output: label if label.dim == 1 else None
        return {
            aten.permute: _permuted, aten.transpose: _transposed, aten.t: _transposed,
            aten.constant_pad_nd: _padded, aten.as_strided_: _restrided,
        }.get(packet)  # fmt: skip

    def fix(self, tensor: Tensor) -> None:
        """No channel of this tensor can be left out."""
        if tensor in self._labels:
            self._nodes.fix(self._labels[tensor].nodes)

    def _reads(self, x: Tensor, dim: int, size: int) -> list[int]:
        """Nodes of the channels that a layer reads along a dimension; all fixed if they are not known."""
        label = self._labels.get(x)
        if label is not None and label.dim == dim and label.zero:
            return label.nodes
        self.fix(x)
        return [0] * size

    def _place(self, tensor: Tensor | None, kind: str, rows: list[int], columns: list[int] | None = None) -> bool:
        """Notes what the slices of a tensor are; False for a tensor that is not one of the model's own."""
        if tensor is None:
            return True
        for layer, key, _ in self._owners.get(id(tensor), []):
            known = self._places.setdefault((layer, key), (kind, rows, columns))
            self._nodes.join_all(known[1], rows)
            if columns is not None and known[2] is not None:
                self._nodes.join_all(known[2], columns)
        return id(tensor) in self._owners

    def _makes(self, weight: Tensor, count: int, columns: list[int] | None) -> list[int]:
        """Nodes of the channels that a weight makes; fixed if it is computed and not a parameter."""
        nodes = self._nodes.fresh(count)
        if not self._place(weight, "weight", nodes, columns):
            self._nodes.fix([*nodes, *(columns or ())])
        return nodes

    def _convolution(self, args: Any, output: Tensor) -> None:
        x, weight, bias = args[:3]
        transposed, groups = args[6], args[8]
        if transposed:
            self.fix(x)
            return
        read = self._reads(x, 1, x.shape[1])
        made = self._makes(weight, weight.shape[0], read if groups == 1 else None)
        self._place(bias, "bias", made)
        if groups > 1:
            by_group = zip(_chunks(read, groups), _chunks(made, groups), strict=True)
            for ours, theirs in by_group:
                for node in [*ours, *theirs]:
                    self._nodes.join(ours[0], node)
            for layer, _, _ in self._owners.get(id(weight), []):
                self._groups[layer] = [chunk[0] for chunk in _chunks(made, groups)]
        self._labels[output] = _Label(1, made)

    def _norm(self, args: Any, output: Any) -> None:
        x, *others = args
        label = self._labels.get(x)
        if label is None:
            return
        tensors = [tensor for tensor in others if isinstance(tensor, Tensor)]
        affine = [id(each) for each in others[:2] if isinstance(each, Tensor)]
        if label.dim != 1 or not all(
            self._place(tensor, "affine" if id(tensor) in affine else "statistic", label.nodes) for tensor in tensors
        ):
            self.fix(x)
        # Without its affine parameters, a norm makes of zeros what its statistics say.
        first = output[0] if isinstance(output, tuple | list) else output
        self._labels[first] = _Label(1, label.nodes, zero=len(affine) == 2)

    def _pointwise(self, func: Any, args: Any, kwargs: Any, given: list[Tensor], output: Any) -> None:
        rank = max(tensor.dim() for tensor in given)
        labelled = [tensor for tensor in given if tensor in self._labels]
        longest = max(len(self._labels[tensor].nodes) for tensor in labelled)
        for tensor in labelled:
            if len(self._labels[tensor].nodes) < longest:
                self.fix(tensor)  # one channel for all of the others
        labelled = [tensor for tensor in labelled if len(self._labels[tensor].nodes) == longest]
        dims = {self._labels[tensor].dim + rank - tensor.dim() for tensor in labelled}
        if len(dims) > 1:
            for tensor in labelled:
                self.fix(tensor)
            return
        dim = dims.pop()
        joined = self._labels[labelled[0]].nodes
        for tensor in labelled[1:]:
            self._nodes.join_all(joined, self._labels[tensor].nodes)
        for tensor in given:
            own = dim - (rank - tensor.dim())
            if tensor not in self._labels and own >= 0 and tensor.shape[own] > 1:
                self._nodes.fix(joined)  # a value for each channel that belongs to no layer
        label = _Label(dim, joined, self._stays_zero(func, args, kwargs))
        for tensor in tensors_of(output):
            self._labels[tensor] = label

    def _stays_zero(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether channels that are zero before are zero after an elementwise operation: by trying one number."""

        def one(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            label = self._labels.get(value)
            number = 0.0 if label is not None and label.zero else 0.7
            return torch.tensor([number]).to(value.dtype)

        mapped = [[one(each) for each in value] if isinstance(value, list | tuple) else one(value) for value in args]
        result = func(*mapped, **{key: one(value) for key, value in kwargs.items()})
        return all(not bool(tensor.any()) for tensor in tensors_of(result))

    def _concatenated(self, args: Any, kwargs: Any, output: Tensor) -> _Label | None:
        parts = args[0]
        along = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % output.dim()
        labels = [self._labels.get(part) for part in parts]
        known = [label for label in labels if label is not None]
        if len({label.dim for label in known}) != 1:
            return None
        dim = known[0].dim
        zero = all(label.zero for label in known)
        if dim == along:
            nodes: list[int] = []
            for part, label in zip(parts, labels, strict=True):
                nodes += [0] * part.shape[dim] if label is None else label.nodes
            return _Label(dim, nodes, zero)
        if len(known) < len(parts):
            return None
        for label in known[1:]:
            self._nodes.join_all(known[0].nodes, label.nodes)
        return _Label(dim, known[0].nodes, zero)

    # The result

    def channels(self) -> Channels:
        """Units in the order of the layers that make them."""
        order = {layer: place for place, layer in enumerate(dict.fromkeys(self._layers()))}
        keys = sorted(self._places, key=lambda key: order[key[0]])
        units: dict[int, int] = {0: FIXED}
        known: dict[tuple[int, ...], Tensor] = {}

        def number(nodes: Sequence[int]) -> Tensor:
            """The same tensor for the same nodes: who looks up masks by it does so once."""
            same = tuple(nodes)
            if same not in known:
                known[same] = torch.tensor([units.setdefault(self._nodes.root(n), len(units) - 1) for n in nodes])
            return known[same]

        # Weights first: what they make is counted in their order.
        for place in keys:
            if self._places[place][0] == "weight":
                number(self._places[place][1])
        places = []
        for layer, key in keys:
            kind, rows, columns = self._places[layer, key]
            places.append(Place(layer, key, kind, number(rows), number(columns) if columns else None))
        groups = {layer: number(nodes) for layer, nodes in self._groups.items()}
        return Channels(len(units) - 1, places, groups)

    def _layers(self) -> Iterator[str]:
        return (layer for owners in self._owners.values() for layer, _, _ in owners)


def _chunks(nodes: list[int], count: int) -> list[list[int]]:
    size = len(nodes) // count
    return [nodes[i : i + size] for i in range(0, len(nodes), size)]


# What other operations do to a label; None where the channels have to be fixed.


def _viewed(label: _Label, args: Any, kwargs: Any, output: Tensor) -> _Label | None:
    """The dimension may be merged with later ones, whose length repeats each channel; it may not be split."""
    before = _product(args[0].shape[: label.dim])
    after = _product(args[0].shape[label.dim + 1 :])
    if args[0].numel() != output.numel():  # an expansion
        dim = label.dim + output.dim() - args[0].dim()
        return _Label(dim, label.nodes, label.zero) if output.shape[dim] == len(label.nodes) else None
    for dim, size in enumerate(output.shape):
        rest = _product(output.shape[dim + 1 :])
        if (
            _product(output.shape[:dim]) == before
            and size % len(label.nodes) == 0
            and size * rest == (len(label.nodes) * after)
        ):
            repeats = size // len(label.nodes)
            return _Label(dim, [node for node in label.nodes for _ in range(repeats)], label.zero)
    return None


def _sliced(label: _Label, args: Any, kwargs: Any, output: Any) -> _Label | None:
    rank = args[0].dim()
    along = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) if tensors_of(output)[0].dim() < rank else None
    if along is None:  # slice, narrow, split
        changed = [d for d in range(rank) if tensors_of(output)[0].shape[d] != args[0].shape[d]]
        return None if label.dim in changed else label
    along %= rank
    return None if along == label.dim else _Label(label.dim - (along < label.dim), label.nodes, label.zero)


def _reduced(label: _Label, args: Any, kwargs: Any, output: Tensor) -> _Label | None:
    rank = args[0].dim()
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if dims is None or not isinstance(dims, list | tuple):
        return None
    along = {dim % rank for dim in dims}
    if label.dim in along or not along:
        return None
    gone = 0 if output.dim() == rank else sum(dim < label.dim for dim in along)
    return _Label(label.dim - gone, label.nodes, label.zero)


def _permuted(label: _Label, args: Any, kwargs: Any, output: Tensor) -> _Label:
    order = [dim % output.dim() for dim in args[1]]
    return _Label(order.index(label.dim), label.nodes, label.zero)


def _transposed(label: _Label, args: Any, kwargs: Any, output: Tensor) -> _Label:
    one, other = (dim % output.dim() for dim in (args[1:3] if len(args) > 1 else (0, 1)))
    return _Label({one: other, other: one}.get(label.dim, label.dim), label.nodes, label.zero)


def _restrided(label: _Label, args: Any, kwargs: Any, output: Tensor) -> _Label | None:
    """Channels-last pooling to one position gives its output these strides, with nothing but channels to arrange."""
    channels, strides = len(label.nodes), args[2]
    alone = _product(output.shape[1:]) == channels == output.shape[1]
    return label if label.dim == 1 and alone and strides[:2] == [channels, 1] else None


def _padded(label: _Label, args: Any, kwargs: Any, output: Tensor) -> _Label:
    """Channels that padding adds are fixed."""
    pad, value = args[1], args[2] if len(args) > 2 else kwargs.get("value", 0)
    place = 2 * (output.dim() - 1 - label.dim)
    before, after = pad[place : place + 2] if place < len(pad) else (0, 0)
    return _Label(label.dim, [0] * before + label.nodes + [0] * after, label.zero and not value)


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
