"""Weights written tensor by tensor: the same bytes as by safetensors, in one file or in shards."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from hub_server import Fault
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_resnet, tokens
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

import sparse_ft
from sparse_ft.hub import ModelError, from_pretrained, save_pretrained
from sparse_ft.hub.shards import Stored, size_in_bytes, stored_tensors, write_file
from sparse_ft.nn import SparseModule


def tiny_llama(*, tied=False):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    sparse_ft.prune(model, 0.9)
    return model.eval()


def test_bytes_are_those_of_safetensors(tmp_path):
    tensors = {
        "b": torch.arange(6).view(2, 3).t(), "a": torch.tensor(3.0), "flag": torch.tensor([True, False, True]),
        "half": torch.randn(3).bfloat16(), "é": torch.randn(0, 4), "wide": torch.randn(2, dtype=torch.float64),
    }  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    write_file(tmp_path / "ours", {name: Stored.of(tensor) for name, tensor in tensors.items()})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("make", [tiny_bert, tiny_resnet, tiny_llama, lambda: tiny_llama(tied=True)])
@pytest.mark.parametrize("converted", [False, True])
def test_a_saved_model_is_what_its_library_would_save(tmp_path, make, converted):
    model = make()
    theirs = tmp_path / "theirs"
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(theirs)
        expected = load_file(theirs / "model.safetensors")
    else:
        expected = model.state_dict()
    if converted:
        sparse_ft.convert(model, policy="always")
    save_pretrained(model, tmp_path / "ours")
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if theirs.exists():
        assert (tmp_path / "ours" / "config.json").read_text() == (theirs / "config.json").read_text()


@pytest.mark.parametrize("make", [tiny_bert, lambda: tiny_llama(tied=True)])
def test_shards_open_everywhere(tmp_path, make):
    model = make()
    with torch.no_grad():
        expected = model(tokens()).logits
    sparse_ft.convert(model, policy="always")
    save_pretrained(model, tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    largest = max(tensor.numel() * 4 for path in shards for tensor in load_file(path).values())
    assert all(path.stat().st_size < max(20_000, largest) + 4_000 for path in shards)
    stock = AutoModelForSequenceClassification if hasattr(model, "bert") else AutoModelForCausalLM
    with torch.no_grad():
        assert torch.equal(stock.from_pretrained(tmp_path)(tokens()).logits, expected)
        again = from_pretrained(tmp_path, policy="always")
        assert torch.allclose(again(tokens()).logits, expected, atol=1e-5)
    save_pretrained(model, tmp_path)  # in one file: the shards of before would contradict it
    assert not list(tmp_path.glob("model-*")) and not (tmp_path / "model.safetensors.index.json").exists()


def test_only_one_weight_is_dense_at_a_time(tmp_path):
    """Nothing of what was dense is kept; the state dict of a converted model would hold all of it."""
    model = tiny_bert()
    sparse_ft.convert(model, policy="always")
    stored = stored_tensors(model)
    assert all(layer._given is None for layer in model.modules() if isinstance(layer, SparseModule))
    state = model.state_dict()
    assert stored.keys() == state.keys()
    assert all(stored[name].shape == t.shape and torch.equal(stored[name].get(), t) for name, t in state.items())


def test_models_whose_weights_are_joined_on_disk(tmp_path):
    """transformers splits the experts of a Mixtral when it saves: no one-to-one names, so it saves by itself."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs")
    save_pretrained(model, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    ("text", "expected"), [("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29), ("500MB", 5 * 10**8), (1000, 1000)]
)
def test_sizes(text, expected):
    assert size_in_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "0", "5 G B"])
def test_sizes_that_are_none(text):
    with pytest.raises(ModelError, match="a size reads 5GB"):
        size_in_bytes(text)


@pytest.mark.parametrize("broken", ["upload", "commit"])
def test_a_push_that_broke_off_goes_on(hub, run_client, tmp_path, broken):
    """What had arrived is not sent again: the server keeps the objects, and the client asks which it has."""
    hub.upload_mode = "lfs"
    save_pretrained(tiny_bert(), tmp_path / "model", max_shard_size="20KB")
    shards = len(list((tmp_path / "model").rglob("*.safetensors")))
    assert shards > 4
    if broken == "commit":
        hub.faults = [Fault("POST", "/commit/", status=403)]
    else:
        hub.faults = [Fault("PUT", f"/{last_object(tmp_path)}$", status=403)]
    code = """
        import sparse_ft
        try:
            print(sparse_ft.push_to_hub("model", "user/tiny"))
        except ValueError as error:
            print("REFUSED", error)
    """
    assert "REFUSED" in run_client(code)
    assert not hub.files("user/tiny"), "nothing half-written is published"
    arrived = len(hub.lfs_objects)
    hub.requests.clear()
    assert "REFUSED" not in run_client(code)
    sent = [path for method, path in hub.requests if method == "PUT"]
    assert arrived > 0 and len(sent) == shards - arrived
    assert sum(name.endswith(".safetensors") for name in hub.files("user/tiny")) == shards


def last_object(folder: Path) -> str:
    """Id of the object that holds the last file."""
    last = max((folder / "model").rglob("*.safetensors"), key=lambda path: path.as_posix())
    return hashlib.sha256(last.read_bytes()).hexdigest()
