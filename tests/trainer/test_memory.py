"""Keeping freed memory, in processes of their own: the setting lasts until a process ends."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from sparse_ft.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(2**24)  # 64 MiB: more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults()
returned = faults()
print(keep_freed_memory())
for _ in range(4):  # where aligned blocks lie in the heap settles within a few rounds
    faults()
print(returned, faults())
"""


def run(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_pages_are_not_faulted_in_again():
    message, figures = run(FAULTS)
    returned, kept = map(int, figures.split())
    assert "kept for reuse" in message
    assert kept < returned / 10


def test_another_allocator_is_left_alone(monkeypatch):
    from sparse_ft.memory import keep_freed_memory

    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    setting = keep_freed_memory()
    assert not setting.active or platform.libc_ver()[0] != "glibc"
    assert "jemalloc" in str(setting) or "no glibc" in str(setting)
