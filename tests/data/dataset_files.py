"""Small datasets on disk."""

import io

import numpy as np
from PIL import Image


def write_csv(path, **columns):
    names = list(columns)
    lines = [",".join(names)] + [",".join(str(v) for v in row) for row in zip(*columns.values(), strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_images(folder, classes=("cat", "dog"), count=4, size=(12, 10)):
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 255, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def png(shade, size=(6, 6)):
    """The bytes of an image of one grey."""
    stream = io.BytesIO()
    Image.new("RGB", size, (shade,) * 3).save(stream, "PNG")
    return stream.getvalue()
