"""Blocks of the native core's own for large results."""

import gc
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_ft.ops import BATCH_LAST, _native, allocation, batch_last_strides, is_batch_last
from sparse_ft.ops.layout import empty

LARGE = (16, 32, 64, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_batch_last_tensor(dtype):
    x = empty(LARGE, BATCH_LAST, torch.zeros(1, dtype=dtype))
    assert x.shape == LARGE and is_batch_last(x) and x.dtype == dtype and x.data_ptr() % 64 == 0
    x.fill_(3)
    assert x.sum(dtype=torch.float32) == 3 * x.numel()
    assert torch.equal(x.clone().add_(1), x + 1)


def test_a_contiguous_one():
    x = allocation.empty(torch.zeros(1), 8, 0, 5, 7)
    assert x.shape == (8, 0, 5, 7) and x.is_contiguous()
    x = allocation.empty(torch.zeros(1), 64, 128, 64)
    assert x.shape == (64, 128, 64) and x.is_contiguous()


def test_others_are_torchs_own(monkeypatch):
    def never(*args):
        raise AssertionError("not a case for a block")

    monkeypatch.setattr(_native, "block", never)
    strides = batch_last_strides(LARGE)
    allocation.empty_strided(torch.zeros(1), (2, 3, 4, 5), batch_last_strides((2, 3, 4, 5)))
    assert allocation.empty_strided(torch.zeros(1, dtype=torch.float64), LARGE, strides).dtype == torch.float64
    assert allocation.empty_strided(torch.zeros(1, device="meta"), LARGE, strides).is_meta
    with FakeTensorMode() as mode:
        assert mode is allocation.empty_strided(torch.zeros(1), LARGE, strides).fake_mode


def test_they_live_as_long_as_their_tensors():
    x = empty(LARGE, BATCH_LAST, torch.zeros(1))
    view = x.fill_(2)[:, 3]
    del x
    gc.collect()
    others = [empty(LARGE, BATCH_LAST, torch.zeros(1)).fill_(7) for _ in range(4)]
    assert (view == 2).all() and len(others) == 4


def test_a_block_that_nobody_takes_is_freed():
    before = _resident()
    for _ in range(200):
        _native.block(0, (1 << 22,), (1,))
    assert _resident() - before < 64 << 20


def test_impossible_sizes():
    for shape in ((1 << 40, 1 << 40), (-1, 4)):
        with pytest.raises(MemoryError):
            _native.block(0, shape, (1,) * len(shape))


def test_in_inference_mode():
    with torch.inference_mode():
        for shape in (LARGE, (2, 3, 4, 5)):
            assert empty(shape, BATCH_LAST, torch.zeros(1))._version == 0  # who computes later must see a change


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_freed_block_fits_the_next_request_of_its_size():
    """Blocks of one size, freed between others that stay: the heap does not grow by what takes their place."""
    code = """
import torch
from sparse_ft.memory import keep_freed_memory
from sparse_ft.ops import BATCH_LAST
from sparse_ft.ops.layout import empty

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

if keep_freed_memory().active:
    like = torch.zeros(1)
    tensors = []
    for i in range(64):
        tensors.append(empty((16, 64, 32, 32), BATCH_LAST, like).fill_(i))
        tensors.append(torch.full((100,), i))  # what would sit between freed blocks
    before = resident()
    for _ in range(3):
        for i in range(0, 128, 4):
            tensors[i] = None
            tensors.append(torch.full((3,), i))
        for i in range(0, 128, 4):
            tensors[i] = empty((16, 64, 32, 32), BATCH_LAST, like).fill_(i)
    assert resident() - before < 32 << 20, (before, resident())
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def kept():
    """Other tests of this process may have ended it."""
    before = _native.keep_blocks(True)
    _native.release_blocks()
    yield
    _native.release_blocks()
    _native.keep_blocks(before)


def test_a_freed_block_is_kept_for_the_next_result_of_about_its_size(kept):
    megabyte = 1 << 18  # in floats
    like = torch.zeros(1)
    place = allocation.empty(like, 40 * megabyte).data_ptr()
    assert allocation.empty(like, 24 * megabyte).data_ptr() == place
    assert allocation.empty(like, 40 * megabyte).data_ptr() == place
    assert _native.release_blocks() >= 40 << 20
    assert _native.release_blocks() == 0
    allocation.empty(like, 40 * megabyte)
    held = allocation.empty(like, 4 * megabyte)  # a tenth: the block is not for it
    assert _native.release_blocks() >= 40 << 20 and held.numel()


def test_blocks_that_are_kept_do_not_pile_up(kept):
    """With those in use they take half more than was in use at most."""
    like = torch.zeros(1)
    for megabytes in (3, 64, 5, 31, 9, 17, 40, 2, 25, 64, 12):
        allocation.empty(like, megabytes << 18)
    assert 64 << 20 <= _native.release_blocks() <= 97 << 20


def test_blocks_of_several_threads(kept):
    like = torch.zeros(1)

    def work(number: int) -> None:
        for i in range(200):
            sizes = [(1 + (i * number + k) % 5) << 18 for k in range(4)]
            blocks = [allocation.empty(like, size).fill_(number) for size in sizes]
            assert all(bool((block[:: 1 << 16] == number).all()) for block in blocks)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(1, 5)))


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults")
def test_passes_do_not_pay_for_pages_again():
    """In a process of its own, where no other setting has been made."""
    code = """
import resource, torch
from sparse_ft.memory import release_memory, return_freed_memory
from sparse_ft.ops import allocation

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    x = torch.zeros(1)
    for megabytes in (49, 49, 98, 25, 49, 49, 12):  # each the result of a layer, whose input is the one before
        x = allocation.empty(x, megabytes << 18).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = [faults() for _ in range(3)][-1]
assert release_memory() >= 98 << 20
return_freed_memory()
returned = [faults() for _ in range(3)][-1]
assert release_memory() == 0
print(kept, returned)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    kept, returned = map(int, done.stdout.split())
    assert kept < returned / 10


def _resident() -> int:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
