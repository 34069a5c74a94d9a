import gc

import torch

from sparse_ft.ops.by_tensor import ByTensor


def test_equal_tensors_are_different_keys():
    kept, a, b = ByTensor(), torch.zeros(3), torch.zeros(3)
    kept.keep(a, "a")
    assert kept.get(a) == "a"
    assert kept.get(b) is None
    kept.keep(a, "later")
    assert kept.get(a) == "later"
    assert len(kept) == 1


def test_values_go_with_their_tensors():
    kept = ByTensor()
    for _ in range(100):  # numbers of dead tensors are given to new ones
        tensor = torch.zeros(3)
        assert kept.get(tensor) is None
        kept.keep(tensor, object())
    del tensor
    gc.collect()
    assert len(kept) == 0
