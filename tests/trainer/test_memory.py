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


HUGE_PAGES = """
import torch
from sparse_ft.memory import keep_freed_memory
from sparse_ft.ops import _native

def asked_for(address):  # for huge pages, by the system's account
    inside = False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            inside = start <= address < end
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()

blocks = [_native.block(0, (2**24,), (1,)), _native.block(0, (2**19,), (1,))]
plain = [asked_for(block.data_ptr() + block.nbytes // 2) for block in blocks]
keep_freed_memory()
torchs = torch.ones(2**24)
beyond = [_native.block(0, (2**27,), (1,)) for _ in range(4)]  # more than the heap had then
kept = [asked_for(block.data_ptr() + block.nbytes // 2) for block in (torchs, *beyond)]
print(all(plain), all(kept), any(plain + kept))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_pages_are_not_faulted_in_again():
    message, figures = run(FAULTS)
    returned, kept = map(int, figures.split())
    assert "kept for reuse" in message
    assert kept < returned / 10


@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="no huge pages here")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_huge_pages_are_asked_for():
    assert run(HUGE_PAGES) == ["True True True"]
    assert run(HUGE_PAGES, SPARSE_FT_HUGE_PAGES="0") == ["False False False"]


def test_another_allocator_is_left_alone(monkeypatch):
    from sparse_ft.memory import keep_freed_memory

    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    setting = keep_freed_memory()
    assert not setting.active or platform.libc_ver()[0] != "glibc"
    assert "jemalloc" in str(setting) or "no glibc" in str(setting)
