"""The compact form of a checkpoint: of sparse weights only the values, and where they are.

``docs/format.md`` is the specification. A sparse weight ``w`` becomes two one-dimensional tensors of a safetensors
file: ``w``, the values in row-major order, and their positions, either ``w.gaps`` (see `sparse_ft.hub.gaps`) or
``w.bitmap``, whichever is smaller. Everything else is stored as it is. The mask is stored, not the nonzeros: a weight
that is in the mask and happens to be 0.0 is still in the mask after a round trip.

The values go under the weight's own name because they have another shape than the weight: a loader that does not know
this format stops at the wrong shape instead of leaving the weight as it was initialised.
"""

import math
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_ft.ops.positions import StoredWeight, decode_bitmap
from sparse_ft.ops.positions import unpack as unpack_weights

from . import gaps
from .bitmap import check_bitmap, pack_bits
from .header import check_shape, header, open_safetensors, read_header, tensor_headers

COMPACT_FORMAT = "sparse_ft.compact"
COMPACT_FOLDER = "sparse"  # below the folder of a checkpoint
COMPACT_FILE = f"{COMPACT_FOLDER}/model.safetensors"
VERSION = "2"
_READABLE = ("1", VERSION)
_DTYPE_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class SparseEntry:
    """A sparse weight as a file's header describes it, before anything of its dense size is allocated.

    Attributes:
        shape, dtype: Of the dense weight.
        nnz: How many values there are.
        values, positions: Names of the tensors that hold it.
        is_gaps: Whether the positions are gaps; otherwise they are a bitmap.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    nnz: int
    values: str
    positions: str
    is_gaps: bool


def pack(
    weights: Iterable[tuple[str, Tensor, Tensor | None]], *, values_dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Compact tensors of weights in dense layout, of which one is needed at a time, and the entries for `metadata`.

    Args:
        weights: Name, dense tensor, and for a weight to store sparsely a bool tensor of its shape, True where it may
            be nonzero.
        values_dtype: float16 or bfloat16 stores the values of float32 weights in 2 bytes instead of 4, rounded;
            None keeps them exact. Weights of another type stay as they are.

    Raises:
        ValueError: A mask of another shape, a nonzero outside its mask, a weight that is not floating point, has one
            dimension or goes beyond the range of `values_dtype`, or a tensor whose name the compact form needs.
    """
    if values_dtype not in (None, *_DTYPE_CODES):
        raise ValueError(f"values_dtype must be float32, float16 or bfloat16, not {values_dtype}")
    tensors: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, tensor, mask in weights:
        if mask is None:
            packed = {name: tensor.contiguous()}
        else:
            packed, entries[name] = _packed(name, tensor, mask, values_dtype)
        if taken := sorted(packed.keys() & tensors.keys()):
            raise ValueError(f"tensor {taken[0]!r} has a name that the compact form of another needs")
        tensors |= packed
    return tensors, entries


def metadata(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """The ``__metadata__`` of a compact file with these sparse weights."""
    return header(COMPACT_FORMAT, VERSION, entries)


def unpack(path: str | Path, *, own: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dense state dict of a compact file, and the masks that the zeros of its weights do not tell.

    The file is checked before memory of dense size is allocated.

    Args:
        path: The file.
        own: Copy the tensors that are stored as they are, which otherwise are views of the mapped file.

    Raises:
        ValueError: The file is not safetensors, not of this format or version, or contradicts itself.
    """
    unpacking = Unpacking(path, own=own)
    unpacking.run(torch.get_num_threads())
    return unpacking.state_dict, unpacking.masks()


class Unpacking:
    """The weights of a compact file on their way into dense memory.

    The file's header is checked, and memory taken, when it is made; `run` needs nothing of Python, so that another
    thread may do it meanwhile.

    Attributes:
        state_dict: Dense; the sparse weights in it are zero before `run`.
        sparse: Names of those.
    """

    def __init__(self, path: str | Path, *, own: bool = False) -> None:
        self._path = path
        with open_safetensors(path) as file:
            tensors = tensor_headers(file)
            entries = read_index(path, file.metadata(), tensors)
            parts = {part for entry in entries.values() for part in (entry.values, entry.positions)}
            self.state_dict = {name: file.get_tensor(name) for name in tensors if name not in parts}
            if own:
                self.state_dict = {name: tensor.clone() for name, tensor in self.state_dict.items()}
            zeros = _Zeros()
            self._stored = {}
            for name, entry in entries.items():
                values, code = file.get_tensor(entry.values), file.get_tensor(entry.positions)
                try:
                    self._stored[name] = _stored(values, code, entry.shape, entry.dtype, entry.is_gaps, zeros)
                except ValueError as error:
                    raise ValueError(f"{path}: {name}: {error}") from error
                self.state_dict[name] = self._stored[name].dense.view(entry.shape)
        self.sparse = set(self._stored)
        self._results: list[tuple[int, str | None]] = []

    def run(self, threads: int) -> None:
        self._results = unpack_weights(list(self._stored.values()), threads)

    def masks(self) -> dict[str, Tensor]:
        """Masks that the zeros of the weights do not tell, after `run`.

        Raises:
            ValueError: The positions of a weight are not as many as its values, or not of a weight of its shape.
        """
        masks = {}
        for (name, stored), (zeros, problem) in zip(self._stored.items(), self._results, strict=True):
            if problem is not None:
                raise ValueError(f"{self._path}: {name}: {problem}")
            if zeros:
                masks[name] = _mask(stored).view(self.state_dict[name].shape)
        return masks


def read_index(
    where: str | Path, metadata: Mapping[str, str] | None, tensors: Mapping[str, tuple[str, list[int]]]
) -> dict[str, SparseEntry]:
    """The sparse weights of a file, from its header alone.

    Args:
        where: The file, for messages.
        metadata: Its ``__metadata__``.
        tensors: Type and shape of each of its tensors.

    Raises:
        ValueError: Another format or version, or the header contradicts itself.
    """
    version, weights = read_header(where, metadata, COMPACT_FORMAT, _READABLE)
    entries = {}
    for name, weight in weights.items():
        try:
            entries[name] = _entry(name, weight, tensors, version)
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {error}") from error
    return entries


def dense_weight(
    values: Tensor, code: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, is_gaps: bool
) -> tuple[Tensor, Tensor | None]:
    """A weight in dense layout, and its mask if that is not where the weight is not zero.

    Raises:
        ValueError: The positions are not as many as the values, or not of a weight of this shape.
    """
    stored = _stored(values, code, shape, dtype, is_gaps, _Zeros())
    [(zeros, problem)] = unpack_weights([stored], threads=1)
    if problem is not None:
        raise ValueError(problem)
    return stored.dense.view(shape), _mask(stored).view(shape) if zeros else None


def _stored(
    values: Tensor, code: Tensor, shape: tuple[int, ...], dtype: torch.dtype, is_gaps: bool, zeros: "_Zeros"
) -> StoredWeight:
    """A weight that is ready to be unpacked.

    Raises:
        ValueError: Values and positions cannot be those of a weight of this shape.
    """
    if values.dim() != 1:
        raise ValueError(f"its values have shape {tuple(values.shape)} instead of one dimension")
    numel = math.prod(shape)
    if is_gaps:
        gaps.check_count(len(values), numel)
    elif len(values) > numel:
        raise ValueError(f"{len(values)} values for a weight of {numel} elements")
    return StoredWeight(code, is_gaps, values.to(dtype), zeros.take(numel, dtype))


def _mask(stored: StoredWeight) -> Tensor:
    """Of an unpacked weight, flat."""
    decode = gaps.decode if stored.is_gaps else decode_bitmap
    mask = torch.zeros(len(stored.dense), dtype=torch.bool)
    mask[decode(stored.code, len(stored.values), len(stored.dense))] = True
    return mask


class _Zeros:
    """Zeroed memory for the weights of a file.

    `torch.zeros` writes every page of it, and has the system fetch each by itself, which takes longer than reading a
    dense file. Pages that are mapped afresh are zero already, and huge where there are some megabytes, so that small
    weights share a mapping. Each is a storage of its own.
    """

    _SHARED = 16 * 2**20  # bytes, which live as long as one weight in them

    def __init__(self) -> None:
        self.block, self.used = _pages(1), 1

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        size = numel * dtype.itemsize
        if size > self._SHARED // 4:
            return torch.frombuffer(_pages(size), dtype=dtype)
        if size > len(self.block) - self.used:
            self.block, self.used = _pages(self._SHARED), 0
        start, self.used = self.used, self.used + -(-size // 64) * 64  # whole cache lines
        return torch.frombuffer(self.block, dtype=dtype, count=numel, offset=start)


def _pages(size: int) -> mmap.mmap:
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _encode(positions: NDArray[np.int64], mask: Tensor) -> tuple[str, Tensor]:
    numel = mask.numel()
    if numel <= gaps.MAX_SPREAD * len(positions):
        code = gaps.encode(positions, numel)
        if len(code) < (numel + 7) // 8:
            return "gaps", torch.from_numpy(code)
    return "bitmap", pack_bits(mask)


def _packed(
    name: str, weight: Tensor, mask: Tensor, values_dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that a sparse weight becomes, and its entry in the header."""
    weight = weight.detach().cpu()
    _check_weight(name, weight, mask)
    positions = np.flatnonzero(mask.cpu().numpy())
    values = weight.reshape(-1)[torch.from_numpy(positions)]
    if torch.count_nonzero(weight) > torch.count_nonzero(values):
        raise ValueError(f"weight {name!r} has nonzero values outside its mask: apply the mask before packing")
    suffix, code = _encode(positions, mask)
    tensors = {name: _narrowed(name, values, values_dtype), f"{name}.{suffix}": code}
    return tensors, {"shape": list(weight.shape), "dtype": str(weight.dtype).removeprefix("torch.")}


def _narrowed(name: str, values: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or values.dtype != torch.float32:
        return values
    rounded = values.to(dtype)
    if torch.any(rounded.isinf() & ~values.isinf()):
        raise ValueError(f"weight {name!r} has values beyond the range of {dtype}")
    return rounded


def _check_weight(name: str, weight: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ValueError(
            f"mask {name!r} must be a bool tensor of shape {tuple(weight.shape)}, "
            f"not {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if weight.dtype not in _DTYPE_CODES:
        raise ValueError(f"weight {name!r} is {weight.dtype}; only float32, float16 and bfloat16 can be sparse")
    check_shape(weight.shape)
    if weight.dim() < 2:
        raise ValueError(f"weight {name!r} has one dimension; a sparse weight has two or more")


def _entry(
    name: str, weight: Mapping[str, Any], tensors: Mapping[str, tuple[str, list[int]]], version: str
) -> SparseEntry:
    shape, code = tuple(weight["shape"]), weight.get("dtype")
    if code not in ("float32", "float16", "bfloat16"):
        raise ValueError(
            "its dtype is missing" if code is None else f"dtype must be float32, float16 or bfloat16, not {code!r:.40}"
        )
    dtype: torch.dtype = getattr(torch, code)
    values = f"{name}.values" if version == "1" else name
    if version == "1" and name in tensors:
        raise ValueError("stored both as a dense and as a sparse tensor")
    if version != "1" and len(shape) < 2:
        raise ValueError(f"a sparse weight has two or more dimensions, not shape {list(shape)}")
    if values not in tensors:
        raise ValueError("its values are missing")
    found, size = tensors[values]
    allowed = set(_DTYPE_CODES.values()) if dtype == torch.float32 else {_DTYPE_CODES[dtype]}
    if len(size) != 1 or found not in allowed:
        raise ValueError(
            f"values of a {dtype} weight must be one-dimensional of type {' or '.join(sorted(allowed))}, "
            f"not {found} {str(size)[:80]}"
        )
    nnz, numel = size[0], math.prod(shape)
    if nnz > numel:
        raise ValueError(f"{nnz} values for a weight of {numel} elements")
    is_gaps = version != "1" and f"{name}.gaps" in tensors
    positions = f"{name}.gaps" if is_gaps else f"{name}.bitmap"
    if not is_gaps:
        check_bitmap(positions, shape, tensors)
    elif tensors[positions][0] != "U8" or len(tensors[positions][1]) != 1:
        raise ValueError(f"its gaps must be one-dimensional of type U8, not {' '.join(map(str, tensors[positions]))}")
    elif numel > gaps.MAX_SPREAD * nnz:
        raise ValueError(f"{nnz} of {numel} positions are not stored as gaps")
    elif f"{name}.bitmap" in tensors:
        raise ValueError("its positions are stored both as gaps and as a bitmap")
    return SparseEntry(shape, dtype, nnz, values, positions, is_gaps)
