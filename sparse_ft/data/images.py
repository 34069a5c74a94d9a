"""Images: what size and normalisation a model wants, augmentation, and the dataset that applies both."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2

from .errors import DataError
from .splits import Split

Augment = Literal["auto", "none", "light", "standard"]
AUGMENTS: tuple[Augment, ...] = get_args(Augment)

# Share of the image's area that a random crop keeps at least. `standard` is what ImageNet models are trained with
# (Szegedy et al. 2015); `light` suits fine-tuning for a few epochs, where strong distortion only slows learning.
CROP_SCALE = {"light": (0.7, 1.0), "standard": (0.08, 1.0)}
CROP_RATIO = {"light": (0.9, 1.1), "standard": (3 / 4, 4 / 3)}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PIL_MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class ImageSpec:
    """The images that a model wants.

    Attributes:
        height, width: input size in pixels.
        mean, std: normalisation of channel values in 0..1; their length is the number of channels.
        interpolation: `bilinear`, `bicubic`, `nearest`, `lanczos`.
        crop_pct: for evaluation the shorter side is resized to size / crop_pct and the centre is cut out; None
            resizes both sides without a cut.
    """

    height: int = 224
    width: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"
    crop_pct: float | None = 0.875

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def channels(self) -> int:
        return len(self.mean)


def image_spec(
    model: nn.Module, processor: Any = None, *, image_size: int | None = None, glyphs: bool = False
) -> ImageSpec:
    """Reads the wanted images off a model and its image processor.

    Args:
        model: a timm model, a `TimmWrapper` model, or a transformers vision model.
        processor: image processor of a transformers model; without one the model's config and ImageNet's
            normalisation are used.
        image_size: another side length in pixels, for models that take images of any size.
        glyphs: the images are characters that fill their frame: nothing is cut off at the border.
    """
    config = getattr(model, "config", None)
    pretrained_cfg = _pretrained_cfg(model)
    if pretrained_cfg:
        spec = _timm_spec(pretrained_cfg)
    elif processor is not None and getattr(processor, "size", None):
        spec = _processor_spec(processor)
    else:
        spec = _config_spec(config)
    if image_size is not None:
        spec = replace(spec, height=image_size, width=image_size)
    return replace(spec, crop_pct=None) if glyphs else spec


def record_spec(model: nn.Module, processor: Any, spec: ImageSpec) -> None:
    """Writes size and crop into the model's own description, so that a saved model is used as it was evaluated."""
    pretrained_cfg = _pretrained_cfg(model)
    if pretrained_cfg:
        pretrained_cfg["input_size"] = (spec.channels, *spec.size)
        pretrained_cfg["crop_mode"] = "squash" if spec.crop_pct is None else "center"
        pretrained_cfg["crop_pct"] = 1.0 if spec.crop_pct is None else spec.crop_pct
    elif processor is not None and spec.crop_pct is None:
        processor.size = {"height": spec.height, "width": spec.width}
        processor.do_center_crop = False


def _pretrained_cfg(model: nn.Module) -> dict[str, Any] | None:
    """How timm describes the model, which its wrapper keeps in its config."""
    config = getattr(model, "config", None)
    found: Any = getattr(model, "pretrained_cfg", None) or getattr(config, "pretrained_cfg", None)
    return found


def _timm_spec(pretrained_cfg: Any) -> ImageSpec:
    from timm.data import resolve_data_config

    found = resolve_data_config(pretrained_cfg=dict(pretrained_cfg))
    channels, height, width = found["input_size"]
    mean, std = tuple(found["mean"]), tuple(found["std"])
    if len(mean) != channels:  # a model built with in_chans=1 keeps the three-channel normalisation of its origin
        mean, std = (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    interpolation = "bicubic" if found["interpolation"] == "random" else found["interpolation"]
    crop_pct = None if found["crop_mode"] == "squash" else found["crop_pct"]
    return ImageSpec(height, width, mean, std, interpolation, crop_pct)


def _processor_spec(processor: Any) -> ImageSpec:
    size = processor.size
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    crop_pct: float | None = None
    if "shortest_edge" in size:
        edge = size["shortest_edge"]
        height = width = edge
        if crop:
            height, width = crop["height"], crop["width"]
        crop_pct = getattr(processor, "crop_pct", None) or height / edge
    else:
        height, width = size["height"], size["width"]
        if crop:
            crop_pct = crop["height"] / height
            height, width = crop["height"], crop["width"]
    normalised = getattr(processor, "do_normalize", True)
    mean = tuple(processor.image_mean) if normalised else (0.0, 0.0, 0.0)
    std = tuple(processor.image_std) if normalised else (1.0, 1.0, 1.0)
    interpolation = Image.Resampling(getattr(processor, "resample", None) or Image.Resampling.BILINEAR).name.lower()
    return ImageSpec(height, width, mean, std, interpolation, crop_pct)


def _config_spec(config: Any) -> ImageSpec:
    spec = ImageSpec()
    size = getattr(config, "image_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        spec = replace(spec, height=height, width=width, crop_pct=None)
    if getattr(config, "num_channels", 3) == 1:
        spec = replace(spec, mean=(0.5,), std=(0.5,))
    return spec


def train_transform(spec: ImageSpec, augment: Augment, glyphs: bool = False) -> Callable[[Image.Image], Tensor]:
    """Builds the transform for training images; `auto` is `light`.

    Characters (`glyphs`) are not mirrored: the class would change.
    """
    level = "light" if augment == "auto" else augment
    if level == "none":
        return eval_transform(spec)
    steps: list[nn.Module] = [
        v2.RandomResizedCrop(
            spec.size, CROP_SCALE[level], CROP_RATIO[level], InterpolationMode(spec.interpolation), antialias=True
        )
    ]
    if not glyphs:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose([*steps, v2.PILToTensor()])


def eval_transform(spec: ImageSpec) -> Callable[[Image.Image], Tensor]:
    """Builds the transform for evaluation images: resize, cut out the centre."""
    interpolation = InterpolationMode(spec.interpolation)
    if spec.crop_pct is None:
        steps: list[nn.Module] = [v2.Resize(spec.size, interpolation, antialias=True)]
    else:
        shorter = math.floor(min(spec.size) / spec.crop_pct)
        steps = [v2.Resize(shorter, interpolation, antialias=True), v2.CenterCrop(spec.size)]
    return v2.Compose([*steps, v2.PILToTensor()])


class ImageDataset(torch.utils.data.Dataset):
    """Images of a split as `{"pixel_values": (C, H, W) uint8, "labels": int}`; `ImageCollator` normalises them.

    Random transforms draw from a stream of their own that depends on (seed, epoch, row) alone. A run resumed in the
    middle of an epoch therefore sees the images that the uninterrupted run sees, however far ahead either loads.
    """

    def __init__(
        self,
        split: Split,
        column: str,
        transform: Callable[[Image.Image], Tensor],
        *,
        channels: int = 3,
        seed: int = 0,
    ):
        self.split = split
        self.column = column
        self.transform = transform
        self.channels = channels
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Makes random transforms draw anew for `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, row: int) -> dict[str, Any]:
        image = self._read(row)
        with _random_stream(self.seed, self.epoch, row):
            example: dict[str, Any] = {"pixel_values": self.transform(image)}
        if self.split.labels is not None:
            example["labels"] = self.split.labels[row]
        return example

    def _read(self, row: int) -> Image.Image:
        try:
            image = self.split.rows[row][self.column]
            if image is None:
                raise ValueError("the row holds no image")
            return image.convert(PIL_MODES[self.channels])
        except Exception as error:  # PIL raises many kinds for damaged files
            raise DataError(
                f"image in row {row} of the {self.split.name} split cannot be read: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error


@contextmanager
def _random_stream(*key: int) -> Iterator[None]:
    """Seeds torch's CPU generator with `key` for a while, and puts its state back."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1))
    try:
        yield
    finally:
        generator.set_state(before)


@dataclass(frozen=True)
class ImageCollator:
    """Batches examples of `ImageDataset`: `pixel_values` (N, C, H, W) float32, normalised, and `labels` (N,) int64.

    A batch is normalised as a whole: image by image it would cost as much as the random crop.

    Attributes:
        mean, std: of channel values in 0..1.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        shapes = {tuple(example["pixel_values"].shape) for example in examples}
        if len(shapes) > 1:
            raise DataError(f"images of one batch have different shapes: {', '.join(map(str, sorted(shapes)))}")
        pixels = torch.stack([example["pixel_values"] for example in examples]).float()
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) * 255 for values in (self.mean, self.std))
        batch = {"pixel_values": pixels.sub_(mean).div_(std)}
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch
