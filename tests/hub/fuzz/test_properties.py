"""What holds for every weight, mask and name, not only for damaged files."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save, save_file

from sparse_ft.hub import ModelError
from sparse_ft.hub.foreign import bitmask, fit, read_checkpoint
from sparse_ft.hub.foreign.names import strip_wrappers
from sparse_ft.hub.limits import check_config
from sparse_ft.hub.shards import Stored, write_file
from sparse_ft.masks.structures import n_of_m

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12)
FEW = settings(max_examples=60, deadline=None)


def a_weight(shape, dtype, density, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    weight = (torch.randn(shape, generator=generator).to(dtype) * mask).to(dtype)
    return weight, mask


@FEW
@given(shape=SHAPES, dtype=DTYPES, density=st.sampled_from([0.0, 0.1, 1.0]), seed=st.integers(0, 999))
def test_any_bitmask_is_read_as_it_was_packed(tmp_path_factory, shape, dtype, density, seed):
    weight, mask = a_weight(shape, dtype, density, seed)
    folder = tmp_path_factory.mktemp("bitmask")
    tensors = {
        "x.shape": torch.tensor(shape),
        "x.bitmask": torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little")),
        "x.compressed": weight[mask],
    }
    save_file(tensors, folder / "model.safetensors")
    state, masks = bitmask.read(folder)
    assert state["x.weight"].dtype == dtype and torch.equal(state["x.weight"], weight)
    assert masks.keys() <= {"x.weight"} and all(torch.equal(found, mask) for found in masks.values())
    assert bool(masks) == bool((weight[mask] == 0).any())


@FEW
@given(shape=SHAPES, dtype=DTYPES, density=st.floats(0, 1), seed=st.integers(0, 999), wrapped=st.booleans())
def test_any_pruned_state_is_read_as_torch_applies_it(tmp_path_factory, shape, dtype, density, seed, wrapped):
    weight, _ = a_weight(shape, dtype, 1.0, seed)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < density
    prefix = "module." if wrapped else ""
    path = tmp_path_factory.mktemp("pruned") / "m.pt"
    torch.save({f"{prefix}a.weight_orig": weight, f"{prefix}a.weight_mask": mask.to(dtype)}, path)
    checkpoint = read_checkpoint(path)
    assert torch.equal(checkpoint.state_dict["a.weight"], torch.where(mask, weight, torch.zeros((), dtype=dtype)))
    assert len(shape) == 1 or torch.equal(checkpoint.masks["a.weight"], mask)


@FEW
@given(tensors=st.dictionaries(NAMES, st.tuples(SHAPES, DTYPES | st.just(torch.int64) | st.just(torch.bool))))
def test_any_file_is_written_as_safetensors_would(tmp_path_factory, tensors):
    if "__metadata__" in tensors:
        return
    made = {name: torch.arange(math.prod(shape)).reshape(shape).to(dtype) for name, (shape, dtype) in tensors.items()}
    path = tmp_path_factory.mktemp("shards") / "ours"
    write_file(path, {name: Stored.of(tensor) for name, tensor in made.items()})
    found = load(path.read_bytes())
    assert found.keys() == made.keys() and all(torch.equal(found[name], tensor) for name, tensor in made.items())
    assert len(path.read_bytes()) == len(save(made, {"format": "pt"}))


@FEW
@given(names=st.lists(NAMES, unique=True, min_size=1), wrappers=st.lists(st.sampled_from(["module.", "_orig_mod."])))
def test_wrappers_are_taken_off_whole_or_not_at_all(names, wrappers):
    names = [f"x.{name}" for name in names]
    state = {"".join(wrappers) + name: torch.tensor(index) for index, name in enumerate(names)}
    assert list(strip_wrappers(state)) == names


@FEW
@given(
    expected=st.dictionaries(NAMES, SHAPES, max_size=4),
    found=st.dictionaries(NAMES, SHAPES, max_size=4),
    same=st.booleans(),
)
def test_what_fits_is_what_the_model_has(expected, found, same):
    model = {name: torch.zeros(shape) for name, shape in expected.items()}
    state = {name: torch.ones(shape) for name, shape in (expected if same else found).items()}
    try:
        taken = fit(state, model, "here")
    except ModelError:
        assert {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in model.items()}
        return
    assert {name: t.shape for name, t in taken.items()} == {name: t.shape for name, t in model.items()}


@FEW
@given(groups=st.integers(1, 6), rows=st.integers(1, 5), group=st.sampled_from([4, 8, 16]), data=st.data())
def test_n_of_m_never_claims_too_little(groups, rows, group, data):
    bits = data.draw(st.lists(st.booleans(), min_size=rows * groups * group, max_size=rows * groups * group))
    mask = torch.tensor(bits).view(rows, groups * group)
    structure = n_of_m(mask)
    if structure is not None:
        kept, size = map(int, structure.split(":"))
        assert int(mask.view(-1, size).sum(1).max()) <= kept


@FEW
@given(
    config=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
        max_leaves=12,
    ),
    layers=st.integers(),
)
def test_any_config_is_judged(config, layers):
    """No type of entry makes the check itself fail, however deep it lies."""
    content = {"num_hidden_layers": layers, "x": config}
    try:
        check_config(content, "here")
    except ModelError as error:
        assert "\n" not in str(error)
    else:
        assert layers <= 10_000
