"""Repositories in compressed-tensors' sparse formats."""

import base64
import json
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tokens

from sparse_ft.hub import ModelError, from_pretrained, save_pretrained
from sparse_ft.hub.foreign import bitmask

# A file that compressed-tensors 0.9.4 wrote: a.fc1.weight in sparse-bitmask, a.fc2.weight in sparse-24-bitmask.
WRITTEN_BY_COMPRESSED_TENSORS = (
    "c-qroVgQ3`r9{27WJA58{POtxw6x;Xl42#RYNeEt%7RoSD<w}e6D1v`;*3NPFWNX(M=2$-BoU!9+Caz1B(_!uY6?^#F8xNB`i)F<OblQK7!fo"
    ";#}Ly969XMnGlUzGG80j};AU)u-wUQ@I%XCK{mJ>c1x2aF#i=Q{O)<qZ#mqv-!UEwD?4~%m8JeMZ#{|<L3kw}X0~2Kbl;kEBXCoUEYJuz{9W22LG"
    "(pGE5Gh~@nSwQBfhGV=F^a9NRbYSuW*jsZl!hiN1`e18h6Z~e;Q&NHd;r8g0AVu#*$w-EvIiU-8bEx81r7%sgn$NcFwTkr066=$JO"
)


def test_file_of_compressed_tensors(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(zlib.decompress(base64.b85decode(WRITTEN_BY_COMPRESSED_TENSORS)))
    state_dict, masks = bitmask.read(tmp_path)
    assert state_dict.keys() == {"a.fc1.weight", "a.fc1.bias", "a.fc2.weight"}
    first = torch.tensor([[0, 1.5, 0, 0, -2, 0, 0, 0, 0, 3], [0] * 10, [0, 0, 0, 0.5, 0, 0, 0, 0, -0.25, 0]])
    assert torch.equal(state_dict["a.fc1.weight"], first)
    second = torch.tensor([[0, 1, 0, -2, 3, 0, 0, 4], [0, 0, 0, 0, 5, 0, 6, 0]], dtype=torch.bfloat16)
    assert torch.equal(state_dict["a.fc2.weight"], second)
    assert list(masks) == ["a.fc2.weight"], "of the two, only the second keeps weights that are zero"
    assert masks["a.fc2.weight"].view(-1, 4).sum(1).tolist() == [2] * 4


def packed(weight):
    mask = weight != 0
    return {
        "shape": torch.tensor(weight.shape),
        "compressed": weight[mask],
        "bitmask": torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little")),
        "row_offsets": mask.sum(-1).cumsum(0) - mask.sum(-1),
    }


def write_repository(folder, model, *, shards=1):
    """The model as llm-compressor pushed such models: every weight packed, config.json with a sparsity_config."""
    save_pretrained(model, folder)
    state = load_file(folder / "model.safetensors")
    tensors = {}
    for name, tensor in state.items():
        if name.endswith(".weight"):
            parts = packed(tensor)
            tensors |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
        else:
            tensors[name] = tensor
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "version": "0.9.4",
        "sparsity_config": {"format": "sparse-bitmask", "global_sparsity": 0.5, "sparsity_structure": "unstructured"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    places = {}
    stems = sorted({name.rpartition(".")[0] for name in tensors})
    for number in range(shards):
        part = {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[0] in stems[number::shards]}
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("shards", [1, 3])
def test_repository(tmp_path, shards):
    model = tiny_bert()
    write_repository(tmp_path, model, shards=shards)
    loaded = from_pretrained(tmp_path, policy="always")
    with torch.no_grad():
        assert torch.allclose(loaded(tokens()).logits, model(tokens()).logits, atol=1e-5)
    save_pretrained(loaded, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


NAME = "bert.encoder.layer.0.output.dense"
DAMAGE = {
    "other shape": ("shape", lambda t: torch.tensor([32, 65]), "needs a bitmask"),
    "huge shape": ("shape", lambda t: torch.tensor([2**31, 2**31]), "at most"),
    "long shape": ("shape", lambda t: torch.ones(9, dtype=torch.int64), "at most 8 numbers"),
    "float shape": ("shape", lambda t: t.float(), "type I64"),
    "negative shape": ("shape", lambda t: -t, "positive"),
    "fewer values": ("compressed", lambda t: t[:-1].clone(), "ones, but there are"),
    "integer values": ("compressed", lambda t: t.int(), "of type I32"),
    "flipped bits": ("bitmask", lambda t: ~t, "ones, but there are"),
    "no bits": ("compressed", None, "compressed is missing"),
    "no shape": ("shape", None, "shape is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tmp_path, case):
    part, change, message = DAMAGE[case]
    write_repository(tmp_path, tiny_bert())
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"{NAME}.{part}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message) as caught:
        from_pretrained(tmp_path)
    assert f"{NAME}.weight" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"quantization_config": {"quant_method": "sparse_ft"}}, None),
        ({"compression_config": {"sparsity_config": {"format": "sparse-bitmask"}}}, "sparse-bitmask"),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, "sparse-bitmask"),
        ({"quantization_config": {"sparsity_config": {"format": "dense"}}}, None),
    ],
)
def test_which_repositories_are_packed(config, expected):
    assert bitmask.sparsity_format(config, "here") == expected


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"sparsity_config": {"format": "sparse-bitmask"}, "config_groups": {"group_0": {}}}, "quantised"),
        ({"sparsity_config": {"format": "marlin-24"}}, "'marlin-24' is not known"),
    ],
)
def test_formats_that_are_refused(entry, message):
    with pytest.raises(ModelError, match=message):
        bitmask.sparsity_format({"quantization_config": entry}, "here")
