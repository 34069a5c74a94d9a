"""The sparsity of a model on the Hub, from the headers of its files: kilobytes are read, not its weights."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from sparse_ft.tables import format_table

from .compact import COMPACT_FILE, COMPACT_FOLDER, SparseEntry, read_index
from .compact_folder import WEIGHTS_INDEX
from .errors import ModelError, explain_hub_error
from .foreign import read_index as read_shards
from .retry import retrying
from .save import INFO_FILE


@dataclass(frozen=True)
class RemoteLayer:
    """A weight matrix or filter bank, by the name of its layer."""

    name: str
    shape: tuple[int, ...]
    nnz: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        return 1 - self.nnz / max(1, self.numel)


@dataclass(frozen=True)
class RemoteModel:
    """What is known of a model without its weights; `str()` is a table.

    Attributes:
        repo_id, commit: Which model.
        source: File that says where the zeros are.
        layers: All weights of two and more dimensions.
        weight_bytes: Size of all weight files in the repository.
    """

    repo_id: str
    commit: str
    source: str
    layers: list[RemoteLayer]
    weight_bytes: int

    @property
    def nnz(self) -> int:
        return sum(layer.nnz for layer in self.layers)

    @property
    def numel(self) -> int:
        return sum(layer.numel for layer in self.layers)

    @property
    def sparsity(self) -> float:
        return 1 - self.nnz / max(1, self.numel)

    def to_dict(self) -> dict[str, Any]:
        layers = [asdict(layer) | {"numel": layer.numel, "sparsity": layer.sparsity} for layer in self.layers]
        own = {name: value for name, value in vars(self).items() if name != "layers"}
        return {**own, "sparsity": self.sparsity, "nnz": self.nnz, "numel": self.numel, "layers": layers}

    def __str__(self) -> str:
        rows = [
            [each.name, "x".join(map(str, each.shape)), f"{each.nnz:,}", f"{each.numel:,}", f"{each.sparsity:.2%}"]
            for each in self.layers
        ]
        total = ["total", "", f"{self.nnz:,}", f"{self.numel:,}", f"{self.sparsity:.2%}"]
        table = format_table(["layer", "shape", "nonzeros", "weights", "sparsity"], rows, footer=total)
        size = f"{self.weight_bytes / 1e6:,.1f} MB"
        return f"{self.repo_id} at {self.commit[:8]}, by {self.source}; {size} of weights not downloaded\n{table}"


def inspect_remote(name: str, *, revision: str | None = None, token: str | None = None) -> RemoteModel | None:
    """The sparsity of a Hub repository from the header of its compact form, or else from its ``sparse_ft.json``.

    Args:
        name: ``USER/NAME``, perhaps with ``@REVISION``.

    Returns:
        None if it has neither: where the zeros are, only its weights tell.

    Raises:
        ModelError: The repository is not there, or what it says contradicts itself.
    """
    repo_id, _, named_revision = name.partition("@")
    revision = revision or named_revision or None
    try:
        return retrying(lambda: _inspect(HfApi(token=token), repo_id, revision))
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(str(error)) from error
    except Exception as error:  # whatever the client and the transport below it raise
        raise explain_hub_error(error, repo_id, revision=revision) from None


def _inspect(api: HfApi, repo_id: str, revision: str | None) -> RemoteModel | None:
    info = api.model_info(repo_id, revision=revision, files_metadata=True)
    sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
    commit = info.sha or ""
    weight_bytes = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))

    def local(name: str) -> str:
        return hf_hub_download(repo_id, name, revision=commit, token=api.token)

    layers: list[RemoteLayer] = []
    index = f"{COMPACT_FOLDER}/{WEIGHTS_INDEX}"
    if COMPACT_FILE in sizes or index in sizes:
        shards = [COMPACT_FILE]
        if COMPACT_FILE not in sizes:
            shards = [f"{COMPACT_FOLDER}/{name}" for name in sorted(set(read_shards(Path(local(index))).values()))]
        for shard in shards:
            header = api.parse_safetensors_file_metadata(repo_id, shard, revision=commit)
            tensors = {name: (str(each.dtype), list(each.shape)) for name, each in header.tensors.items()}
            entries = read_index(f"{repo_id}/{shard}", header.metadata, tensors)
            layers += _layers(tensors, entries)
        source = index if COMPACT_FILE not in sizes else COMPACT_FILE
    elif INFO_FILE in sizes:
        layers = _told(local(INFO_FILE), f"{repo_id}/{INFO_FILE}")
        source = INFO_FILE
    else:
        return None
    return RemoteModel(repo_id, commit, source, layers, weight_bytes)


def _layers(tensors: dict[str, tuple[str, list[int]]], entries: dict[str, SparseEntry]) -> list[RemoteLayer]:
    parts = {part for entry in entries.values() for part in (entry.values, entry.positions)}
    layers = []
    for name in sorted({name for name in tensors if name not in parts} | set(entries)):
        if name in entries:
            shape, nnz = entries[name].shape, entries[name].nnz
        else:
            shape = tuple(tensors[name][1])
            nnz = math.prod(shape)  # a weight with noteworthy zeros would be stored by its nonzeros
        if len(shape) >= 2:
            layers.append(RemoteLayer(name.removesuffix(".weight"), shape, nnz))
    return layers


def _told(path: str, where: str) -> list[RemoteLayer]:
    try:
        with open(path, encoding="utf-8") as file:
            layers = json.load(file)["sparsity"]["layers"]
        return [RemoteLayer(str(each["name"]), tuple(map(int, each["shape"])), int(each["nnz"])) for each in layers]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} does not list the sparsity of layers") from error
