"""`sparse-ft env`: what a bug report needs."""

import argparse
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

from sparse_ft.cli import options

PACKAGES = ("sparse_ft", "torch", "torchvision", "transformers", "timm", "datasets", "accelerate", "huggingface_hub")
OPENMP_LIBRARY = re.compile(r"lib(?:gomp|iomp5|omp)\b[^/]*\.(?:so|dylib)[.\d]*$")


def make_parser(prog: str) -> argparse.ArgumentParser:
    parser = options.make_parser(
        prog, "Show versions, processor, instruction set, threads and the OpenMP runtimes in use.", f"  {prog}"
    )
    options.add_json_option(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    with options.figures_only(args.json) as out:
        facts = environment()
        if args.json:
            options.print_result(out, facts, True)
            return
        flat = {**facts.pop("versions"), **facts}
        width = max(map(len, flat))
        for name, value in flat.items():
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            print(f"{name:<{width}}  {text}", file=out)


def environment() -> dict[str, Any]:
    """Versions and machine; imports torch and the native core."""
    import torch

    from sparse_ft import ops

    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": ops.active_isa(),
        "instruction_sets": ops.available_isas(),
        "openmp_runtimes": openmp_runtimes(),
        "accelerator": str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "none",
    }


def openmp_runtimes() -> list[str]:
    """Paths of the OpenMP runtimes that are mapped into this process; more than one share the cores badly.

    Empty where the system does not tell (no /proc).
    """
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return []
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if OPENMP_LIBRARY.search(path))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
