"""The ``sparse`` folder of a checkpoint: its weights once more in compact form, made from the dense ones."""

import json
import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import compact
from .bitmap import MASK_FILE, read_masks
from .foreign import read_index
from .header import open_safetensors

logger = logging.getLogger(__name__)

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
QUANT_METHOD = "sparse_ft"  # by which transformers' plug-in is found
WORTH = 0.75  # a compact form that takes more than this share of the dense one is not written
_COPIED = ("generation_config.json",)


def write_compact_folder(source: Path, target: Path, *, values_dtype: torch.dtype | None = None) -> bool:
    """Write the compact form of a checkpoint, shard by shard, with the config.json under which transformers opens it.

    A weight is stored sparsely where that is smaller: its mask is where it is not zero, or what
    ``sparse_masks.safetensors`` says.

    Args:
        source: Folder with config.json and weights in dense layout.
        target: Folder to write, which does not exist yet.
        values_dtype: See `sparse_ft.hub.compact.pack`.

    Returns:
        False if nothing was written, because too little of the model is zero.

    Raises:
        ValueError: A file contradicts itself, or `values_dtype` does not fit the weights.
    """
    masks = read_masks(source / MASK_FILE) if (source / MASK_FILE).is_file() else {}
    shards = weight_files(source)
    if unknown := sorted(set(masks) - {name for names in shards.values() for name in names}):
        # transformers may store a weight under another name than the model has it under.
        logger.warning("%s: no compact form, for the mask of %s is of no tensor in the files", source, unknown[0])
        return False
    target.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    dense_bytes = compact_bytes = nnz = numel = 0
    for file_name in shards:
        with open_safetensors(source / file_name) as file:
            tensors, entries = compact.pack(_weights(file, masks), values_dtype=values_dtype)
        save_file(tensors, target / file_name, compact.metadata(entries))
        weight_map |= dict.fromkeys(tensors, file_name)
        nnz += sum(len(tensors[name]) for name in entries)
        numel += sum(math.prod(entry["shape"]) for entry in entries.values())
        dense_bytes += (source / file_name).stat().st_size
        compact_bytes += (target / file_name).stat().st_size
    if compact_bytes > WORTH * dense_bytes:
        shutil.rmtree(target)
        return False
    if list(shards) != [WEIGHTS]:
        index = {"metadata": {"total_size": compact_bytes}, "weight_map": weight_map}
        (target / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "format": compact.COMPACT_FORMAT,
        "version": compact.VERSION,
        "sparsity": round(1 - nnz / max(1, numel), 6),
    }
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return True


def read_compact_folder(folder: Path, *, own: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dense state dict and masks (those that the zeros do not tell) of a compact form, see `compact.unpack`.

    Raises:
        ValueError: A file is missing, of another format, or contradicts itself.
    """
    reading = Reading(folder, own=own)
    masks = reading.finish()
    return reading.state_dict, masks


class Reading:
    """A compact form that is decoded by another thread while this one builds the model, which takes about as long.

    Attributes:
        state_dict: Dense. Until `finish` has returned, its sparse weights hold zeros or part of their values.
        sparse: Names of those.

    Raises:
        ValueError: A file is missing, of another format, or contradicts itself.
    """

    def __init__(self, folder: Path, *, own: bool = False) -> None:
        self._parts = [compact.Unpacking(folder / file_name, own=own) for file_name in weight_files(folder)]
        self.state_dict = {name: tensor for part in self._parts for name, tensor in part.state_dict.items()}
        self.sparse = {name for part in self._parts for name in part.sparse}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="sparse_ft-unpack")
        self._done = self._worker.submit(self._run, torch.get_num_threads())
        self._worker.shutdown(wait=False)

    def _run(self, threads: int) -> None:
        for part in self._parts:
            part.run(threads)

    def finish(self) -> dict[str, Tensor]:
        """Waits for the weights; the masks that their zeros do not tell.

        Raises:
            ValueError: The positions of a weight are not those of its values.
        """
        self._done.result()
        return {name: mask for part in self._parts for name, mask in part.masks().items()}

    def is_part_of(self, model: nn.Module) -> bool:
        """Whether the model holds the very memory of each sparse weight, so that it gets what is decoded later."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        held = {parameter.data_ptr() for parameter in parameters.values()}
        for name in self.sparse:
            weight, parameter = self.state_dict[name], parameters.get(name)
            replaced = parameter is not None and parameter.shape != weight.shape  # a new classifier
            if weight.data_ptr() not in held and not replaced:
                return False
        return True


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX))


def weight_files(folder: Path) -> dict[str, list[str]]:
    """The safetensors files of a checkpoint folder, each with the names of its tensors.

    Raises:
        ValueError: The index is no index, or names a file outside the folder or one that is not there.
    """
    if (folder / WEIGHTS).is_file():
        with open_safetensors(folder / WEIGHTS) as file:
            return {WEIGHTS: list(file.keys())}
    path = folder / WEIGHTS_INDEX
    shards: dict[str, list[str]] = {}
    for name, file_name in read_index(path).items():
        shards.setdefault(file_name, []).append(name)
    for file_name in shards:
        if not (folder / file_name).is_file():
            raise ValueError(f"{path}: {file_name!r:.80} is missing")
    return shards


def _weights(file: Any, masks: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Each tensor of a file, with its mask if it is to be stored sparsely."""
    for name in file.keys():
        tensor = file.get_tensor(name)
        mask = masks.get(name)
        if mask is None and tensor.dim() >= 2 and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16):
            zeros = tensor.numel() - int(torch.count_nonzero(tensor))
            if zeros * tensor.element_size() > (tensor.numel() + 7) // 8:  # what its bitmap takes
                mask = tensor != 0
        yield name, tensor, mask
