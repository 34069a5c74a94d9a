"""SparseML's ``.pth``: its names for the layers of a ResNet, translated to those of torchvision and timm.

SparseML writes ``{"state_dict": ..., "recipe": ..., "epoch": ..., "arch_key": ...}`` with plain zeros in the weights.
Models of its own zoo have names of their own; its transformers and torchvision models keep the original ones.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from sparse_ft.hub.errors import ModelError

NAME = "SparseML ResNet"
_QUANTISED = ("activation_post_process", "fake_quant", "weight_zero_point", "observer")
_RULES = (
    (re.compile(r"^input\.(conv|bn)\."), r"\g<1>1."),
    (re.compile(r"^sections\.(\d+)\."), lambda match: f"layer{int(match[1]) + 1}."),
    (re.compile(r"(layer\d+\.\d+)\.identity\.conv\."), r"\1.downsample.0."),
    (re.compile(r"(layer\d+\.\d+)\.identity\.bn\."), r"\1.downsample.1."),
    (re.compile(r"^classifier\.fc\."), "fc."),
)


def read(state_dict: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """The state dict under the names of torchvision and timm; None if it is not of a SparseML ResNet.

    Raises:
        ModelError: The model was quantised, too.
    """
    quantised = next((name for name in state_dict if any(part in name for part in _QUANTISED)), None)
    if quantised is not None:
        raise ModelError(
            f"{where}: {quantised} belongs to a quantised model; sparse_ft reads weights in floating point, such as "
            "the checkpoint from before the quantisation"
        )
    if "input.conv.weight" not in state_dict or "sections.0.0.conv1.weight" not in state_dict:
        return None
    return {_renamed(name): tensor for name, tensor in state_dict.items()}, {}


def _renamed(name: str) -> str:
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name
