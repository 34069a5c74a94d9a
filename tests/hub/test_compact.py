import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_ft.hub import bitmap, compact, compact_folder, gaps

DOCS = Path(__file__).parents[2] / "docs"


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


def pack(state_dict, masks, **options):
    """Tensors and metadata of a file."""
    weights = ((name, tensor, masks.get(name)) for name, tensor in state_dict.items())
    tensors, entries = compact.pack(weights, **options)
    return tensors, compact.metadata(entries)


def test_round_trip_keeps_active_zeros(path):
    state_dict, masks = a_state_dict()
    write(path, *pack(state_dict, masks))
    restored, restored_masks = compact.unpack(path)
    assert restored.keys() == state_dict.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in state_dict.items())
    assert torch.equal(restored_masks["conv.weight"], masks["conv.weight"])
    assert masks["conv.weight"].sum() > torch.count_nonzero(state_dict["conv.weight"])


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_any_weight_survives(tmp_path_factory, shape, density, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    weight = (torch.randn(shape, generator=generator) * mask).to(dtype)
    path = tmp_path_factory.mktemp("compact") / "w.safetensors"
    write(path, *pack({"w": weight}, {"w": mask}))
    restored, masks = compact.unpack(path)
    assert restored["w"].dtype == dtype and torch.equal(restored["w"], weight)
    assert torch.equal(masks.get("w", restored["w"] != 0), mask)


def a_weight(sparsity, shape=(512, 1024), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) >= sparsity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.8, 0.9, 0.95, 0.99])
def test_size_is_within_five_percent_of_the_information(path, sparsity, dtype):
    weight = a_weight(sparsity)
    write(path, *pack({"w": weight}, {"w": weight != 0}, values_dtype=dtype))
    n, k = weight.numel(), int(torch.count_nonzero(weight))
    choices = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2)  # log2 of n over k
    bound = choices / 8 + k * dtype.itemsize
    assert bound < path.stat().st_size < 1.05 * bound


@pytest.mark.parametrize(
    ("sparsity", "part"), [(0.3, "w.bitmap"), (0.6, "w.bitmap"), (0.8, "w.gaps"), (0.99, "w.gaps")]
)
def test_the_smaller_of_both_codes_is_taken(sparsity, part):
    weight = a_weight(sparsity)
    tensors, _ = pack({"w": weight}, {"w": weight != 0})
    assert set(tensors) == {"w", part} and tensors[part].numel() <= weight.numel() // 8


def test_a_weight_with_next_to_nothing_takes_a_bitmap():
    weight = torch.zeros(64, 64)
    assert "w.bitmap" in pack({"w": weight}, {"w": weight != 0})[0]
    weight[5, 5] = 1.0  # one of 4,096: a few bytes that announced as much would make a reader allocate at will
    assert "w.bitmap" in pack({"w": weight}, {"w": weight != 0})[0]


def test_stored_under_the_weights_own_name_in_another_shape(path):
    state_dict, masks = a_state_dict()
    write(path, *pack(state_dict, masks))
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        torch.nn.Conv2d(3, 5, 3).load_state_dict(
            {
                name.removeprefix("conv."): tensor
                for name, tensor in load_file(path).items()
                if name.startswith("conv.")
            },
            strict=False,
        )


def as_version_1(state_dict, masks):
    """The first version of the format: the values beside the bitmap, under a name of their own."""
    tensors = {name: tensor for name, tensor in state_dict.items() if name not in masks}
    for name, mask in masks.items():
        tensors |= {f"{name}.values": state_dict[name][mask], f"{name}.bitmap": bitmap.pack_bits(mask)}
    entries = {name: {"shape": list(mask.shape), "dtype": "float32"} for name, mask in masks.items()}
    return tensors, compact.metadata(entries) | {"sparse_ft.version": "1"}


def test_version_1_is_read(path):
    state_dict, masks = a_state_dict()
    write(path, *as_version_1(state_dict, masks))
    restored, restored_masks = compact.unpack(path)
    assert restored.keys() == state_dict.keys() and restored_masks.keys() == masks.keys()
    assert all(torch.equal(restored[name], tensor) for name, tensor in state_dict.items())
    assert torch.equal(restored_masks["conv.weight"], masks["conv.weight"])


@pytest.mark.parametrize("width", [0, 1, 3, 5, 9])
def test_long_codes(width):
    rng = np.random.default_rng(width)
    positions = np.cumsum(rng.integers(1, 2 ** (width + 1), size=100_003)) - 1
    numel = int(positions[-1]) + 1
    assert np.array_equal(decoded(gaps.encode(positions, numel), len(positions), numel), positions)


def test_the_example_of_the_specification(path):
    """docs/format.md prints a whole file."""
    lines = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ?)+)  ", (DOCS / "format.md").read_text(), re.MULTILINE)
    path.write_bytes(bytes.fromhex("".join(lines)))
    weight = torch.zeros(2, 20)
    weight.view(-1)[torch.tensor([3, 4, 17, 33])] = torch.tensor([1.0, -2.0, 0.5, 3.0])
    assert torch.equal(compact.unpack(path)[0]["w"], weight)
    printed = load_file(path)
    write(path, *pack({"w": weight}, {"w": weight != 0}))
    written = load_file(path)
    assert written.keys() == printed.keys() and all(torch.equal(written[name], printed[name]) for name in printed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_values_come_back_in_the_weights_type(path, dtype):
    state_dict, masks = a_state_dict()
    write(path, *pack(state_dict, masks, values_dtype=dtype))
    restored, _ = compact.unpack(path)
    expected = state_dict["conv.weight"].to(dtype).float()
    assert restored["conv.weight"].dtype == torch.float32 and torch.equal(restored["conv.weight"], expected)
    assert torch.equal(restored["conv.bias"], state_dict["conv.bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, m: m.update({"conv.weight": m["conv.weight"][:4]}), "bool tensor of shape"),
        (lambda s, m: m.update({"conv.weight": m["conv.weight"].float()}), "bool tensor of shape"),
        (lambda s, m: m["conv.weight"].zero_(), "nonzero values outside its mask"),
        (lambda s, m: s.update({"conv.weight.gaps": torch.zeros(2)}), "name that the compact form"),
        (lambda s, m: m.update({"conv.bias": s["conv.bias"] != 0}), "has one dimension"),
        (lambda s, m: s.update({"conv.weight": s["conv.weight"].double()}), "only float32"),
    ],
)
def test_pack_refuses(change, message):
    state_dict, masks = a_state_dict()
    change(state_dict, masks)
    with pytest.raises(ValueError, match=message):
        pack(state_dict, masks)


def test_pack_refuses_values_beyond_float16():
    with pytest.raises(ValueError, match="beyond the range"):
        pack({"w": torch.tensor([[1e6]])}, {"w": torch.tensor([[True]])}, values_dtype=torch.float16)


def changed_entry(metadata, **changes):
    weights = json.loads(metadata["sparse_ft.weights"])
    weights["conv.weight"].update(changes)
    return metadata | {"sparse_ft.weights": json.dumps(weights)}


def with_tensor(tensors, name, tensor):
    return {**tensors, f"conv.weight{name}": tensor}


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != f"conv.weight{name}"}


HEADERS = {
    "other format": (lambda t, m: (t, m | {"sparse_ft.format": "zip"}), "sparse_ft.format"),
    "no metadata": (lambda t, m: (t, {}), "sparse_ft.format"),
    "newer version": (lambda t, m: (t, m | {"sparse_ft.version": "3"}), "version '3'; .* reads version '1' and '2'"),
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
    "wrong dtype": (lambda t, m: (t, changed_entry(m, dtype="object")), "dtype must be"),
    "no dtype": (lambda t, m: (t, changed_entry(m, dtype=None)), "dtype is missing"),
    "wide values": (lambda t, m: (t, changed_entry(m, dtype="float16")), "of type F16"),
}
VALUES = {
    "none": (without, "values are missing"),
    "too many": (lambda t, n: with_tensor(t, n, torch.zeros(136)), "136 values for a weight of 135 elements"),
    "integers": (lambda t, n: with_tensor(t, n, torch.zeros(3, dtype=torch.int64)), "of type"),
    "square": (lambda t, n: with_tensor(t, n, torch.zeros(3, 3)), "one-dimensional"),
}
VERSION_1 = {
    "dense too": (lambda t, m: (with_tensor(t, "", torch.zeros(5, 3, 3, 3)), m), "both as a dense"),
    "larger shape": (lambda t, m: (t, changed_entry(m, shape=[6, 3, 3, 3])), "needs a bitmap"),
    "short bitmap": (lambda t, m: (with_tensor(t, ".bitmap", torch.zeros(3, dtype=torch.uint8)), m), "needs a bitmap"),
    "float bitmap": (lambda t, m: (with_tensor(t, ".bitmap", torch.zeros(17)), m), "needs a bitmap"),
    "too few values": (lambda t, m: (with_tensor(t, ".values", t["conv.weight.values"][1:].clone()), m), "more ones"),
    "all values": (lambda t, m: (with_tensor(t, ".values", torch.zeros(135)), m), "fewer ones"),
    "no bitmap": (lambda t, m: (without(t, ".bitmap"), m), "bitmap is missing"),
}
GAPS = {
    "none": (lambda t: without(t, ".gaps"), "bitmap is missing"),
    "empty": (lambda t: with_tensor(t, ".gaps", torch.zeros(0, dtype=torch.uint8)), "does not begin with"),
    "floats": (lambda t: with_tensor(t, ".gaps", torch.zeros(17)), "of type U8"),
    "both codes": (lambda t: with_tensor(t, ".bitmap", torch.zeros(17, dtype=torch.uint8)), "both as gaps and"),
    "one value less": (lambda t: with_tensor(t, "", t["conv.weight"][1:].clone()), "gaps"),
    "few values": (lambda t: with_tensor(t, "", t["conv.weight"][:0].clone()), "not stored as gaps"),
    "wide remainder": (lambda t: with_tensor(t, ".gaps", t["conv.weight.gaps"] | 0xFF), "does not begin with"),
    "zeros": (lambda t: with_tensor(t, ".gaps", t["conv.weight.gaps"] & 0), "gaps"),
    "shorter": (lambda t: with_tensor(t, ".gaps", t["conv.weight.gaps"][:-2].clone()), "gaps"),
    "longer": (lambda t: with_tensor(t, ".gaps", torch.cat([t["conv.weight.gaps"], torch.zeros(1).byte()])), "gaps"),
}


def refused(path, tensors, metadata, message):
    write(path, tensors, metadata)
    with pytest.raises(ValueError, match=message) as caught:
        compact.unpack(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("pack", [pack, as_version_1])
@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_refused(path, case, pack):
    change, message = HEADERS[case]
    refused(path, *change(*pack(*a_state_dict())), message)


@pytest.mark.parametrize(("pack", "name"), [(pack, ""), (as_version_1, ".values")])
@pytest.mark.parametrize("case", VALUES)
def test_values_that_are_refused(path, case, pack, name):
    change, message = VALUES[case]
    tensors, metadata = pack(*a_state_dict())
    refused(path, change(tensors, name), metadata, message)


@pytest.mark.parametrize("case", VERSION_1)
def test_bitmaps_that_are_refused(path, case):
    change, message = VERSION_1[case]
    refused(path, *change(*as_version_1(*a_state_dict())), message)


@pytest.mark.parametrize("case", GAPS)
def test_gaps_that_are_refused(path, case):
    change, message = GAPS[case]
    tensors, metadata = pack(*a_state_dict())
    refused(path, change(tensors), metadata, message)


def test_gaps_beyond_the_last_element_are_refused(path):
    tensors, metadata = pack(*a_state_dict())
    refused(path, tensors, changed_entry(metadata, shape=[2, 27]), "gaps")


def test_ones_after_the_end_of_a_bitmap_are_refused(path):
    tensors, metadata = as_version_1(*a_state_dict())  # 135 elements: 7 bits used in the last byte
    tensors["conv.weight.bitmap"][-1] |= 0b1000_0000
    tensors["conv.weight.values"] = torch.cat([tensors["conv.weight.values"], torch.ones(1)])
    refused(path, tensors, metadata, "after the last element")


def decoded(code, count, numel):
    return gaps.decode(torch.from_numpy(code), count, numel).numpy()


def as_specified(code, count, numel):
    """The positions of a gap code bit by bit, as docs/format.md puts it; None where it says that the code is wrong."""
    bits = [byte >> place & 1 for byte in code[1:] for place in range(8)]
    if not code or code[0] > 16 or not 0 < count <= numel <= 1024 * count or not code[-1]:
        return None
    start = -(-count * code[0] // 8) * 8
    positions, zeros, position = [], 0, -1
    for number, bit in enumerate(bits[start:]):
        if not bit:
            zeros += 1
            continue
        place = len(positions) * code[0]
        if len(positions) == count:
            return None
        remainder = sum(each << shift for shift, each in enumerate(bits[place : place + code[0]]))
        position += (zeros << code[0]) + remainder + 1
        positions.append(position)
        zeros, last = 0, number
    complete = len(positions) == count and position < numel and len(bits) - start == (last // 8 + 1) * 8
    return positions if complete else None


@settings(max_examples=500, deadline=None)
@given(
    width=st.integers(0, 18),
    planes=st.binary(max_size=60) | st.lists(st.sampled_from([0, 1, 3, 16, 255]), max_size=60).map(bytes),
    count=st.integers(0, 60),
    numel=st.integers(1, 20_000),
)
def test_any_bytes_are_decoded_as_specified(width, planes, count, numel):
    code = bytes([width]) + planes
    # The number of ones that there are makes most of the codes right ones.
    for length in {count, sum(byte.bit_count() for byte in planes[-(-count * width // 8) :])}:
        expected = as_specified(code, length, numel)
        try:
            positions = decoded(np.frombuffer(code, dtype=np.uint8).copy(), length, numel).tolist()
        except ValueError:
            positions = None
        assert positions == expected


@settings(max_examples=200, deadline=None)
@given(positions=st.sets(st.integers(0, 5000), min_size=5), spare=st.integers(1, 100))
def test_any_positions_survive(positions, spare):
    positions = np.array(sorted(positions), dtype=np.int64)
    numel = int(positions[-1]) + spare
    code = gaps.encode(positions, numel)
    assert np.array_equal(decoded(code, len(positions), numel), positions)
    assert as_specified(code.tolist(), len(positions), numel) == positions.tolist()
    width = max(0, int(math.log2(numel / len(positions))))
    assert len(code) <= (len(positions) * (1 + width) + (numel - len(positions)) / 2**width) / 8 + 3


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\xff" * 64])
def test_unpack_refuses_other_files(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        compact.unpack(path)


def test_truncated_file_is_refused(path):
    write(path, *pack(*a_state_dict()))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a safetensors file"):
        compact.unpack(path)


@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_is_refused_or_harmless(tmp_path_factory, changes):
    """Bytes overwritten anywhere: a ValueError, or tensors that keep the format's promises."""
    path = tmp_path_factory.mktemp("fuzz") / "w.safetensors"
    write(path, *pack(*a_state_dict()))
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


def test_reading_a_folder_fills_the_memory_that_it_gave(tmp_path):
    weight = torch.randn(40, 60) * (torch.rand(40, 60) < 0.1)
    folder = a_compact_folder(tmp_path, weight)
    reading = compact_folder.Reading(folder)
    given = reading.state_dict["weight"]
    masks = reading.finish()
    assert reading.sparse == {"weight"} and not masks
    assert torch.equal(given, weight) and torch.equal(reading.state_dict["bias"], torch.ones(40))


def test_reading_tells_whether_a_model_holds_its_memory(tmp_path):
    weight = torch.randn(40, 60) * (torch.rand(40, 60) < 0.1)
    reading = compact_folder.Reading(a_compact_folder(tmp_path, weight))
    model = torch.nn.Linear(60, 40)
    assert not reading.is_part_of(model)
    model.load_state_dict(reading.state_dict, assign=True)
    reading.finish()
    assert reading.is_part_of(model) and torch.equal(model.weight, weight)
    assert reading.is_part_of(torch.nn.Linear(60, 7))  # a new classifier in its place
    assert not reading.is_part_of(torch.nn.Sequential(model.double()))  # converted, and so copied


def test_damaged_positions_are_found_when_reading_ends(tmp_path):
    folder = a_compact_folder(tmp_path, torch.eye(40, 60))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["weight.gaps"][-1] = 0
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    reading = compact_folder.Reading(folder)
    with pytest.raises(ValueError, match="model.safetensors: weight: the code of its gaps is longer or shorter"):
        reading.finish()


def a_compact_folder(tmp_path, weight):
    (tmp_path / "config.json").write_text("{}")
    save_file({"weight": weight, "bias": torch.ones(len(weight))}, tmp_path / "model.safetensors")
    assert compact_folder.write_compact_folder(tmp_path, tmp_path / "sparse")
    return tmp_path / "sparse"
