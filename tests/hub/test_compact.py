import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sparse_ft.hub import bitmap, compact


def a_state_dict():
    torch.manual_seed(0)
    mask = torch.rand(5, 3, 3, 3) < 0.2
    weight = torch.randn(5, 3, 3, 3) * mask
    first = mask.nonzero()[0]
    weight[tuple(first)] = 0.0  # trained, and zero at present
    return {"conv.weight": weight, "conv.bias": torch.randn(5), "bn.num_batches_tracked": torch.tensor(7)}, {
        "conv.weight": mask
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def write(path, tensors, metadata):
    save_file(tensors, path, metadata)


def test_round_trip_keeps_active_zeros(path):
    state_dict, masks = a_state_dict()
    write(path, *compact.pack(state_dict, masks))
    restored, restored_masks = compact.unpack(path)
    assert restored.keys() == state_dict.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in state_dict.items())
    assert torch.equal(restored_masks["conv.weight"], masks["conv.weight"])
    assert masks["conv.weight"].sum() > torch.count_nonzero(state_dict["conv.weight"])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_any_weight_survives(tmp_path_factory, shape, density, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    weight = (torch.randn(shape, generator=generator) * mask).to(dtype)
    path = tmp_path_factory.mktemp("compact") / "w.safetensors"
    write(path, *compact.pack({"w": weight}, {"w": mask}))
    restored, masks = compact.unpack(path)
    assert restored["w"].dtype == dtype and torch.equal(restored["w"], weight) and torch.equal(masks["w"], mask)


def test_bitmap_is_lowest_bit_first():
    mask = torch.tensor([[True, False, False, False, False, False, False, False], [False, True] + [False] * 6])
    assert bitmap.pack_bits(mask).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_values_come_back_in_the_weights_type(path, dtype):
    state_dict, masks = a_state_dict()
    write(path, *compact.pack(state_dict, masks, values_dtype=dtype))
    restored, _ = compact.unpack(path)
    expected = state_dict["conv.weight"].to(dtype).float()
    assert restored["conv.weight"].dtype == torch.float32 and torch.equal(restored["conv.weight"], expected)
    assert torch.equal(restored["conv.bias"], state_dict["conv.bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, m: m.update({"absent": m["conv.weight"]}), "no weight of that name"),
        (lambda s, m: m.update({"conv.weight": m["conv.weight"][:4]}), "bool tensor of shape"),
        (lambda s, m: m.update({"conv.weight": m["conv.weight"].float()}), "bool tensor of shape"),
        (lambda s, m: m["conv.weight"].zero_(), "nonzero values outside its mask"),
        (lambda s, m: s.update({"conv.weight.values": torch.zeros(2)}), "name that the compact form"),
        (lambda s, m: s.update({"conv.weight": s["conv.weight"].double()}), "only float32"),
    ],
)
def test_pack_refuses(change, message):
    state_dict, masks = a_state_dict()
    change(state_dict, masks)
    with pytest.raises(ValueError, match=message):
        compact.pack(state_dict, masks)


def test_pack_refuses_values_beyond_float16():
    with pytest.raises(ValueError, match="beyond the range"):
        compact.pack({"w": torch.tensor([1e6])}, {"w": torch.tensor([True])}, values_dtype=torch.float16)


def changed_entry(metadata, **changes):
    weights = json.loads(metadata["sparse_ft.weights"])
    weights["conv.weight"].update(changes)
    return metadata | {"sparse_ft.weights": json.dumps(weights)}


def with_tensor(tensors, name, tensor):
    return {**tensors, f"conv.weight{name}": tensor}


HOSTILE = {
    "other format": (lambda t, m: (t, m | {"sparse_ft.format": "zip"}), "sparse_ft.format"),
    "no metadata": (lambda t, m: (t, {}), "sparse_ft.format"),
    "newer version": (lambda t, m: (t, m | {"sparse_ft.version": "2"}), "version '2'"),
    "not JSON": (lambda t, m: (t, m | {"sparse_ft.weights": "{"}), "not JSON"),
    "nested JSON": (lambda t, m: (t, m | {"sparse_ft.weights": "[" * 100_000}), "not JSON"),
    "a list": (lambda t, m: (t, m | {"sparse_ft.weights": "[]"}), "must map"),
    "huge shape": (lambda t, m: (t, changed_entry(m, shape=[2**31, 2**31])), "at most"),
    "huge product": (lambda t, m: (t, changed_entry(m, shape=[2**20, 2**20])), "at most"),
    "many dimensions": (lambda t, m: (t, changed_entry(m, shape=[1] * 9)), "dimensions"),
    "negative size": (lambda t, m: (t, changed_entry(m, shape=[-5, -27])), "positive"),
    "empty size": (lambda t, m: (t, changed_entry(m, shape=[0])), "positive"),
    "fraction": (lambda t, m: (t, changed_entry(m, shape=[5.0, 27])), "positive"),
    "bool size": (lambda t, m: (t, changed_entry(m, shape=[True, 135])), "positive"),
    "no shape": (lambda t, m: (t, changed_entry(m, shape=None)), "dimensions"),
    "larger shape": (lambda t, m: (t, changed_entry(m, shape=[6, 3, 3, 3])), "needs a bitmap"),
    "wrong dtype": (lambda t, m: (t, changed_entry(m, dtype="object")), "dtype must be"),
    "no dtype": (lambda t, m: (t, changed_entry(m, dtype=None)), "dtype is missing"),
    "dense too": (lambda t, m: (with_tensor(t, "", torch.zeros(5, 3, 3, 3)), m), "both as a dense"),
    "short bitmap": (lambda t, m: (with_tensor(t, ".bitmap", torch.zeros(3, dtype=torch.uint8)), m), "needs a bitmap"),
    "float bitmap": (lambda t, m: (with_tensor(t, ".bitmap", torch.zeros(17)), m), "needs a bitmap"),
    "too few values": (lambda t, m: (with_tensor(t, ".values", t["conv.weight.values"][1:].clone()), m), "ones, but"),
    "too many values": (lambda t, m: (with_tensor(t, ".values", torch.zeros(135)), m), "ones, but"),
    "integer values": (lambda t, m: (with_tensor(t, ".values", torch.zeros(3, dtype=torch.int64)), m), "of type"),
    "square values": (lambda t, m: (with_tensor(t, ".values", torch.zeros(3, 3)), m), "one-dimensional"),
    "wide values": (lambda t, m: (t, changed_entry(m, dtype="float16")), "of type F16"),
    "no values": (lambda t, m: ({k: v for k, v in t.items() if k != "conv.weight.values"}, m), "values are missing"),
    "no bitmap": (lambda t, m: ({k: v for k, v in t.items() if k != "conv.weight.bitmap"}, m), "bitmap is missing"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_unpack_refuses(path, case):
    change, message = HOSTILE[case]
    write(path, *change(*compact.pack(*a_state_dict())))
    with pytest.raises(ValueError, match=message) as caught:
        compact.unpack(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_unpack_refuses_ones_after_the_end(path):
    tensors, metadata = compact.pack(*a_state_dict())  # 135 elements: 7 bits used in the last byte
    tensors["conv.weight.bitmap"][-1] |= 0b1000_0000
    tensors["conv.weight.values"] = torch.cat([tensors["conv.weight.values"], torch.ones(1)])
    write(path, tensors, metadata)
    with pytest.raises(ValueError, match="after the last element"):
        compact.unpack(path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_unpack_refuses_other_files(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        compact.unpack(path)


def test_truncated_file_is_refused(path):
    write(path, *compact.pack(*a_state_dict()))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a safetensors file"):
        compact.unpack(path)


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_is_refused_or_harmless(tmp_path_factory, changes):
    """Bytes overwritten anywhere: a ValueError, or tensors that keep the format's promises."""
    path = tmp_path_factory.mktemp("fuzz") / "w.safetensors"
    write(path, *compact.pack(*a_state_dict()))
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[place % len(content)] = value
    path.write_bytes(content)
    try:
        state_dict, masks = compact.unpack(path)
    except ValueError:
        return
    for name, mask in masks.items():
        assert mask.shape == state_dict[name].shape and not torch.any(state_dict[name][~mask])


def test_mask_file_round_trip(path):
    _, masks = a_state_dict()
    bitmap.write_masks(path, masks)
    assert torch.equal(bitmap.read_masks(path)["conv.weight"], masks["conv.weight"])
    with pytest.raises(ValueError, match="sparse_ft.format"):
        compact.unpack(path)
