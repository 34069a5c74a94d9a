"""What the figures were measured on."""

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import sparse_ft
from sparse_ft import ops
from sparse_ft.ops import _native

PACKAGES = ("torch", "timm", "transformers", "onnxruntime", "sparseprop", "sparselab")
CPU_INFO = Path("/proc/cpuinfo")


def machine() -> dict[str, str]:
    """Processor and versions: figures of two machines do not belong on one page."""
    text = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    model = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    return {
        "processor": model or platform.processor(),
        "cores": str(os.cpu_count()),
        "AMX (bf16)": "yes" if "amx_bf16" in flags else "no",
        "AVX-512 bf16": "yes" if "avx512_bf16" in flags else "no",
        "instruction set in use": ops.active_isa(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "sparse_ft": sparse_ft.__version__,
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def fma_peak() -> float:
    """GF/s of one core, fused multiply-adds from registers."""
    return _native.fma_peak(0.3)


def roofs() -> dict[str, float]:
    """GF/s of one core."""
    return {
        "FMA from registers": fma_peak(),
        **{
            f"load + FMA, {label}": _native.load_fma_peak(size, 0.3)
            for label, size in (("16 KiB", 16 << 10), ("256 KiB", 256 << 10), ("8 MiB", 8 << 20))
        },
    }
