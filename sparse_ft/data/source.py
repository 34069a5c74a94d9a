"""Where a dataset comes from: bundled, files, a folder of images by class, or the Hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import datasets

from .digits import load_digits
from .errors import DataError

BUNDLED = {"digits": load_digits}

FILE_BUILDERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".txt": "text",
}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# Names under which files and folders hold a split, most usual first.
SPLIT_PREFIXES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass(frozen=True)
class Source:
    """An opened dataset.

    Attributes:
        splits: the splits under the names `train`, `validation`, `test` (others may occur).
        folder: what paths inside the rows are relative to; None where rows carry their data.
    """

    splits: datasets.DatasetDict
    folder: Path | None = None


def open_dataset(name: str | Mapping[str, str], config: str | None = None) -> Source:
    """Opens the dataset that `name` stands for.

    Args:
        name: a bundled name (`digits`), a file or folder, or a Hub id. `./digits` is a folder even though `digits` is
            bundled. A mapping gives a file or folder for each split.
        config: configuration of a Hub dataset, such as `sst2` of `nyu-mll/glue`.

    Raises:
        DataError: nothing is found under that name, or it is found and cannot be read.
    """
    if isinstance(name, Mapping):
        parts = {split: open_dataset(path) for split, path in name.items()}
        opened = datasets.DatasetDict({split: part.splits["train"] for split, part in parts.items()})
        return Source(opened, folder=next(iter(parts.values())).folder)
    if name in BUNDLED:
        return Source(BUNDLED[name]())
    path = Path(name).expanduser()
    if path.is_file():
        return _read_files({"train": [path]})
    if path.is_dir():
        return _open_folder(path)
    if _looks_like_path(name):
        raise DataError(f"dataset {name!r}: no such file or folder")
    return _open_hub(name, config)


def _looks_like_path(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).suffix.lower() in FILE_BUILDERS


def _open_folder(folder: Path) -> Source:
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in FILE_BUILDERS)
    if any(p.suffix.lower() != ".txt" for p in files):
        files = [p for p in files if p.suffix.lower() != ".txt"]  # a README.txt or LICENSE.txt beside the data
    by_split = {
        split: [p for p in files if p.name.lower().startswith(prefixes)] for split, prefixes in SPLIT_PREFIXES.items()
    }
    if by_split["train"]:
        return _read_files({split: paths for split, paths in by_split.items() if paths})
    if files and not any(by_split.values()):
        return _read_files({"train": files})
    if any(p.suffix.lower() in IMAGE_SUFFIXES for p in folder.rglob("*")):
        return _read_image_folder(folder)
    if files:
        raise DataError(f"dataset {str(folder)!r}: no file named train* beside {', '.join(p.name for p in files)}")
    raise DataError(
        f"dataset {str(folder)!r}: the folder holds neither {', '.join(FILE_BUILDERS)} files nor images in one "
        "subfolder per class"
    )


def _read_files(by_split: dict[str, list[Path]]) -> Source:
    suffixes = {p.suffix.lower() for paths in by_split.values() for p in paths}
    if len(suffixes) > 1:
        names = ", ".join(p.name for paths in by_split.values() for p in paths)
        raise DataError(f"dataset files have different formats: {names}; keep one format in the folder")
    suffix = suffixes.pop()
    if suffix not in FILE_BUILDERS:
        name = next(iter(by_split.values()))[0]
        raise DataError(f"dataset file {str(name)!r}: format not known, use one of {', '.join(FILE_BUILDERS)}")
    data_files = {split: [str(p) for p in paths] for split, paths in by_split.items()}
    try:
        options = {"keep_linebreaks": True} if suffix == ".txt" else {}  # lines of one running text
        opened = datasets.load_dataset(FILE_BUILDERS[suffix], data_files=data_files, **options)
    except Exception as error:  # the builders raise whatever their parser does
        names = ", ".join(str(p) for paths in by_split.values() for p in paths)
        raise DataError(f"dataset cannot be read from {names}: {_root_message(error)}") from error
    return Source(opened, folder=next(iter(by_split.values()))[0].parent)


def _read_image_folder(folder: Path) -> Source:
    try:
        return Source(datasets.load_dataset("imagefolder", data_dir=str(folder), drop_labels=False))
    except Exception as error:
        raise DataError(f"images cannot be read from {str(folder)!r}: {_root_message(error)}") from error


def _open_hub(name: str, config: str | None) -> Source:
    try:
        return Source(datasets.load_dataset(name, config))
    except Exception as error:
        raise DataError(
            f"dataset {name!r} is neither bundled ({', '.join(BUNDLED)}), nor a local path, nor could it be loaded "
            f"from the Hub: {_root_message(error)}"
        ) from error


def _root_message(error: BaseException) -> str:
    """First line of the innermost message: `datasets` wraps a parser's error in a generic one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0] or type(error).__name__
