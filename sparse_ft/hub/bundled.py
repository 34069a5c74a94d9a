"""The models that come with the package."""

from pathlib import Path

_FOLDER = Path(__file__).parent.parent / "bundled"

BUNDLED_MODELS = {
    "resnet20-cifar10": _FOLDER / "resnet20_cifar10",
}
"""Folder of each bundled model by name, each with a config.json and compact weights in ``sparse/``."""
