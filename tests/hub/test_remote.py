"""Models on the Hub: what of them is downloaded, and what is known without."""

import json

import pytest
import torch
from tiny_models import tiny_bert

from sparse_ft.hub import save_pretrained
from sparse_ft.masks import sparsity

CLIENT = """
import json
import torch
torch.set_num_threads(1)
from sparse_ft.cli import main
from sparse_ft.hub import ModelError, load_model, resolve

print(main(["inspect", "user/model", "--json"]))
print(main(["inspect", "user/told@main"]))
print(main(["inspect", "user/broken"]))
print("===")
for name, form in ("user/model", "auto"), ("user/model", "dense"), ("user/told", "auto"), ("user/told", "compact"):
    try:
        source = resolve(name, form=form)
        files = source.folder.rglob("*.safetensors")
        print(source.compact, sorted(path.relative_to(source.folder).as_posix() for path in files))
    except ModelError as error:
        print(error)
expected = torch.load("expected.pt")
found = load_model("user/model").state_dict()
print(all(torch.equal(found[name], weight) for name, weight in expected.items()))
"""


@pytest.fixture
def model(tmp_path):
    torch.set_num_threads(1)
    bert = tiny_bert()
    save_pretrained(bert, tmp_path / "model")
    torch.save(bert.state_dict(), tmp_path / "expected.pt")
    return bert


def test_kilobytes_tell_the_sparsity_and_the_compact_form_is_downloaded_alone(hub, run_client, model, tmp_path):
    folder = tmp_path / "model"
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    without = {name: content for name, content in files.items() if not name.startswith("sparse/")}
    hub.add_repository("user/model", files)
    hub.add_repository("user/told", without)
    hub.add_repository("user/broken", {"config.json": b"{}", "sparse/model.safetensors": b"x" * 40})
    inspection, _, resolved = run_client(CLIENT).partition("===\n")

    figures, position = json.JSONDecoder().raw_decode(inspection)
    layers = {layer["name"]: layer for layer in figures["layers"]}
    for layer in sparsity(model).layers:
        assert layers[layer.name]["nnz"] == layer.nnz and layers[layer.name]["shape"] == list(layer.shape)
    assert figures["source"] == "sparse/model.safetensors" and (
        figures["weight_bytes"] == len(files["model.safetensors"]) + len(files["sparse/model.safetensors"])
    )
    rest = inspection[position:]
    assert "by sparse_ft.json" in rest and "bert.encoder.layer.0.intermediate.dense" in rest
    assert rest.strip().splitlines()[0] == "0" and rest.strip().splitlines()[-1] == "1"

    lines = resolved.splitlines()
    assert lines[0] == "True ['sparse/model.safetensors']"
    assert lines[1] == "False ['model.safetensors', 'sparse/model.safetensors']"
    assert lines[2] == "False ['model.safetensors']"
    assert lines[3] == "model 'user/told' on the Hub has its weights in dense form only, not in compact form"
    assert lines[4] == "True"
    dense = [path for method, path in hub.requests if method == "GET" and path.endswith("/model.safetensors")]
    assert sum("user/model" in path and "/sparse/" not in path for path in dense) == 1, "where it was asked for alone"
