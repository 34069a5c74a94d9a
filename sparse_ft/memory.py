"""Keeps freed memory in the process, so that a training step does not pay for the same pages again and again.

glibc hands every large block back to the system when it is freed. A training step frees and allocates all its
activations, and each page of a fresh block costs a fault: 128,000 faults, about 170 ms, in one step of a ResNet-18 at
batch 32. That would be half of a sparse step.
"""

import ctypes
import os
import platform
from dataclasses import dataclass

# Parameters of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD = 2**30  # blocks from here on go back to the system as before
_TRIM_THRESHOLD = 2**31 - 1  # the largest that mallopt takes: the top of the heap stays
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
    if platform.libc_ver()[0] != "glibc":
        return MemorySetting(False, f"freed memory goes back to the system: no glibc on {platform.system()}")
    preloaded = os.environ.get("LD_PRELOAD", "")
    for allocator in _OTHER_ALLOCATORS:
        if allocator in preloaded:
            return MemorySetting(False, f"memory is managed by {allocator} (LD_PRELOAD): left as it is")
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)):
        return MemorySetting(False, "freed memory goes back to the system: mallopt refused the thresholds")
    return MemorySetting(True, "freed memory is kept for reuse (glibc mallopt), which saves page faults")
