"""Keeps freed memory in the process, so that a step does not pay for the same pages again and again.

glibc hands every large block back to the system when it is freed. A step frees and allocates all its activations, and
each page of a fresh block costs a fault: 128,000 faults, about 170 ms, in one training step of a ResNet-18 with 32
images. That would be half of a sparse step.

So the native core keeps large results that are freed for the next ones (csrc/block.h), in every process that uses it.
That does nothing for torch's own results. What trains asks for more: `keep_freed_memory` makes malloc keep everything.

Both ask for huge pages: a step touches more small ones than a processor keeps translations of addresses for.
SPARSE_FT_HUGE_PAGES=0 in the environment asks for none.
"""

import ctypes
import os
import platform
from dataclasses import dataclass

from sparse_ft.ops import _native

# Parameters of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD = 2**30  # blocks from here on go back to the system as before
_TRIM_THRESHOLD = 2**31 - 1  # the largest that mallopt takes: the top of the heap stays
_RESERVED = _MMAP_THRESHOLD - 2**16  # bytes by which the heap grows at once
_OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


@dataclass(frozen=True)
class MemorySetting:
    """What `keep_freed_memory` did: `active`, and in one line what that means or why not."""

    active: bool
    message: str

    def __str__(self) -> str:
        return self.message


def keep_freed_memory() -> MemorySetting:
    """Makes glibc's malloc keep freed blocks of up to 1 GiB for reuse, for the whole process and until it ends.

    The process then holds the memory of its largest step instead of returning it in between. Off glibc, or with
    another allocator preloaded, nothing is changed and the result says why.
    """
    others = "freed memory goes back to the system, but for large results of native layers"
    if platform.libc_ver()[0] != "glibc":
        return MemorySetting(False, f"{others}: no glibc on {platform.system()}")
    preloaded = os.environ.get("LD_PRELOAD", "")
    for allocator in _OTHER_ALLOCATORS:
        if allocator in preloaded:
            return MemorySetting(False, f"memory is managed by {allocator} (LD_PRELOAD): left as it is")
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)):
        return MemorySetting(False, f"{others}: mallopt refused the thresholds")
    _native.keep_blocks(False)  # malloc does now, and cuts and joins them
    _native.ask_for_huge_heap(_RESERVED)
    return MemorySetting(True, "freed memory is kept for reuse (glibc mallopt), which saves page faults")


def return_freed_memory() -> None:
    """From now on large results of native layers go back to the allocator when they are freed, as everything else."""
    _native.keep_blocks(False)


def release_memory() -> int:
    """Gives back what is kept of freed results of native layers, as after the last pass of a large batch.

    Returns:
        How many bytes that were.
    """
    return _native.release_blocks()
