"""Sparse models for other runtimes: ONNX and `torch.export`, zeros kept, and compared with the model.

Both hold the dense model: neither format has a sparse convolution or matrix product. A runtime that skips zeros, or a
packer that drops them, finds them where they are.
"""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ft.conversion import to_dense
from sparse_ft.masks import mask_state
from sparse_ft.masks.targets import unwrap

from .errors import ModelError, one_line
from .staging import staged

OPSET = 18
TOLERANCE = 1e-3  # of the largest output: runtimes add in another order and fold norms into convolutions
_ONE_FILE = 2**31 - 2**20  # bytes; an ONNX file is a protobuf, which ends at 2 GB
_LOSS_INPUTS = ("labels", "start_positions", "end_positions")


@dataclass(frozen=True)
class Export:
    """A file that was written and checked.

    Attributes:
        path: of the file.
        format: ``"onnx"`` or ``"torch"``.
        inputs: names and shapes of the inputs; the first dimension, the batch, may be any.
        zeros: number of zeros in the pruned weights, all of which are in the file.
        difference: largest difference between outputs of the file and of the model, over the largest output.
    """

    path: str
    format: str
    inputs: dict[str, list[int]]
    zeros: int
    difference: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        shapes = ", ".join(f"{name} {'x'.join(['N', *map(str, shape[1:])])}" for name, shape in self.inputs.items())
        return (
            f"{self.path} ({self.format}): inputs {shapes}; {self.zeros:,} zeros kept; outputs differ by "
            f"{self.difference:.1e} of the largest"
        )


def export_onnx(model: nn.Module, path: str | Path, inputs: Tensor | Mapping[str, Tensor]) -> Export:
    """Write a model as ONNX, with torch's `dynamo` exporter, and compare it with the model in onnxruntime.

    The file computes what the model computes in evaluation mode, from `inputs` to its first output (``logits``), for
    any batch size. From 2 GB on, the weights lie beside it in a file of the same name with ``.data`` at its end.

    Args:
        model: sparse or dense; it is not changed.
        path: of the file. One that is there is replaced after the comparison.
        inputs: a batch of two or more, best of real data: one tensor, or the arguments by name. Labels are left out.

    Raises:
        ModelError: onnx, onnxscript or onnxruntime is not installed, the model cannot be exported, a zero was lost or
            the outputs differ.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  what torch's exporter builds with
    except ImportError as error:
        raise ModelError(f"ONNX export needs {error.name}: pip install 'sparse_ft[onnx]'") from error
    subject = _Subject(model, inputs)
    path = Path(path)
    with staged(path.absolute().parent) as stage:
        file = stage / path.name
        try:
            program = torch.onnx.export(
                subject.module,
                subject.arguments,
                dynamo=True,
                opset_version=OPSET,
                input_names=subject.names,
                output_names=["logits"],
                dynamic_shapes=subject.dynamic_shapes,
                verbose=False,
            )
            assert program is not None
            program.save(file, external_data=subject.weight_bytes >= _ONE_FILE)
        except Exception as error:  # the exporter raises about any type for what it cannot trace
            raise ModelError(f"this {subject.kind} cannot be exported as ONNX: {one_line(error)}") from error
        weights = (torch.from_numpy(onnx.numpy_helper.to_array(t, str(stage)).copy()) for t in _weights(onnx, file))
        zeros = subject.check_zeros(weights)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

        def run(*arguments: Tensor) -> Tensor:
            named = dict(zip(subject.names, arguments, strict=True))
            return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in named.items()})[0])

        difference = subject.compare(run)
    return Export(str(path), "onnx", subject.shapes, zeros, difference)


def export_program(model: nn.Module, path: str | Path, inputs: Tensor | Mapping[str, Tensor]) -> Export:
    """Write a model as a `torch.export` program (``.pt2``), and compare what is read back with the model.

    `torch.export.load(path).module()` needs torch alone. Arguments and errors are those of `export_onnx`.
    """
    subject = _Subject(model, inputs)
    path = Path(path)
    if path.suffix != ".pt2":
        raise ModelError(f"a torch.export program is a .pt2 file, not {path.name!r}")
    with staged(path.absolute().parent) as stage:
        file = stage / path.name
        try:
            program = torch.export.export(subject.module, subject.arguments, dynamic_shapes=subject.dynamic_shapes)
            torch.export.save(program, file)
        except Exception as error:  # as above
            raise ModelError(f"this {subject.kind} cannot be exported by torch.export: {one_line(error)}") from error
        stored = torch.export.load(file)
        zeros = subject.check_zeros(stored.state_dict.values())
        difference = subject.compare(stored.module())
    return Export(str(path), "torch", subject.shapes, zeros, difference)


class _FirstOutput(nn.Module):
    """A model that takes its inputs by position and gives its first output, the logits where there is no loss."""

    def __init__(self, model: nn.Module, names: list[str], options: dict[str, Any]):
        super().__init__()
        self.model = model
        self.names = names
        self.options = options

    def forward(self, *inputs: Tensor) -> Tensor:
        if not self.names:
            return self.model(*inputs)
        outputs = self.model(**dict(zip(self.names, inputs, strict=True)), **self.options)
        return outputs if isinstance(outputs, Tensor) else outputs[0]


class _Subject:
    """A model made ready for an exporter: a dense copy in evaluation mode, with its inputs in order."""

    def __init__(self, model: nn.Module, inputs: Tensor | Mapping[str, Tensor]):
        inner = unwrap(model)
        self.kind = type(inner).__name__
        dense = to_dense(copy.deepcopy(inner)).eval().requires_grad_(False)
        self._pruned = Counter((mask.numel(), int(mask.sum())) for mask in mask_state(dense).values())
        self.weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in dense.state_dict().values())
        named = {} if isinstance(inputs, Tensor) else {k: v for k, v in inputs.items() if k not in _LOSS_INPUTS}
        self.arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(named.values())
        sizes = {len(tensor) if tensor.dim() else 0 for tensor in self.arguments}
        if len(sizes) != 1 or min(sizes) < 2:
            raise ModelError("an export needs a batch of at least two, of which every input has as many")
        takes_cache = "use_cache" in inspect.signature(dense.forward).parameters
        options = {"use_cache": False} if named and takes_cache else {}
        self.module = _FirstOutput(dense, list(named), options).eval()
        self.names = list(named) or ["input"]
        self.shapes = {name: list(t.shape) for name, t in zip(self.names, self.arguments, strict=True)}
        batch = torch.export.Dim("batch")
        self.dynamic_shapes = {"inputs": tuple({0: batch} for _ in self.arguments)}

    def check_zeros(self, stored: Iterable[Tensor]) -> int:
        """Number of zeros in the pruned weights, every one of which is a stored weight of as many nonzeros.

        Exporters may transpose a weight and scale its channels, which moves no zero elsewhere.
        """
        lost = self._pruned - Counter((tensor.numel(), int(torch.count_nonzero(tensor))) for tensor in stored)
        if lost:
            numel, nonzeros = next(iter(lost))
            raise ModelError(
                f"the exported {self.kind} lacks a weight of {numel} elements and {nonzeros} nonzeros: the exporter "
                "has changed its zeros"
            )
        return sum((numel - nonzeros) * count for (numel, nonzeros), count in self._pruned.items())

    @torch.no_grad()
    def compare(self, exported: Callable[..., Tensor]) -> float:
        """Largest relative difference to the model, on the batch and on a part of it."""
        worst = 0.0
        for size in (len(self.arguments[0]), 1):
            part = [tensor[:size] for tensor in self.arguments]
            expected, found = self.module(*part), exported(*part)
            if found.shape != expected.shape:
                raise ModelError(
                    f"the exported {self.kind} gives shape {tuple(found.shape)}, not {tuple(expected.shape)}"
                )
            scale = float(expected.abs().max())
            worst = max(worst, float((found - expected).abs().max()) / max(scale, torch.finfo(torch.float32).tiny))
        if not worst <= TOLERANCE:
            raise ModelError(f"the exported {self.kind} computes something else: outputs differ by {worst:.1e}")
        return worst


def _weights(onnx: Any, file: Path) -> Iterable[Any]:
    return onnx.load(file, load_external_data=False).graph.initializer
