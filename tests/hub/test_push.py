"""From a sparse model to the Hub and back into stock timm and transformers, in processes of their own."""

import json
from pathlib import Path

import pytest
from hub_server import READ_TOKEN
from huggingface_hub import ModelCard

from sparse_ft.hub import ModelError, push, push_to_hub

TESTS = Path(__file__).parent

PUSH = """
import pathlib
import sys
import torch
sys.path.insert(0, {tests!r})
from tiny_models import images, tiny_bert, tiny_resnet, tokens
import sparse_ft
from sparse_ft.hub import ModelError, push_to_hub, save_pretrained

torch.set_num_threads(1)
resnet, bert = tiny_resnet(), tiny_bert()
with torch.no_grad():
    logits = [resnet(images()), bert(tokens()).logits]
torch.save([logits, resnet.state_dict(), bert.state_dict()], "expected.pt")
for model in (resnet, bert):
    sparse_ft.convert(model, policy="always")
print(push_to_hub(resnet, "resnet", label_names=[f"class {{i}}" for i in range(10)]))

# A training run's folder, with what must not travel.
save_pretrained(bert, "run")
for name in ("checkpoint-5/model.safetensors", "_scratch/x", "training_args.bin", "optimizer.pt"):
    path = pathlib.Path("run", name)
    path.parent.mkdir(exist_ok=True)
    path.write_text("private")
print(push_to_hub("run", "bert", private=True))
print(push_to_hub("run", "user/bert", revision="tuned"))
push_to_hub("run", "user/small")
push_to_hub("run", "user/small", compact_only=True, values_dtype=torch.bfloat16)
pathlib.Path("run", "README.md").write_text("# Changed")
print(push_to_hub("run", "user/bert", create_pr=True, commit_message="Another card"))

# A second push must not leave the masks of the first beside its weights.
with torch.no_grad():
    resnet.layer1[0].conv1.weight[:2] = 0.0
push_to_hub(resnet, "user/stale")
with torch.no_grad():
    resnet.layer1[0].conv1.weight[:2] = 1.0
from huggingface_hub import list_repo_files
print("sparse_masks.safetensors" in list_repo_files("user/stale"))
push_to_hub(resnet, "user/stale")
print("sparse_masks.safetensors" in list_repo_files("user/stale"))

for token in ("hf_unknowntoken", {read_token!r}, "hf_bad\\ntoken"):
    try:
        push_to_hub("run", "user/other", token=token)
    except ModelError as error:
        print(error)
"""

STOCK = """
import sys
import timm
import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

torch.set_num_threads(1)
images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
logits, resnet_weights, bert_weights = torch.load("expected.pt")
resnet = timm.create_model("hf-hub:user/resnet", pretrained=True).eval()
wrapped = AutoModelForImageClassification.from_pretrained("user/resnet")
bert = AutoModelForSequenceClassification.from_pretrained("user/bert")
print(wrapped.config.id2label[3])
for model, weights in ((resnet, resnet_weights), (wrapped.timm_model, resnet_weights), (bert, bert_weights)):
    found = model.state_dict()
    print(found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights))
with torch.no_grad():
    print(torch.allclose(resnet(images), logits[0], atol=1e-6))
    print(torch.allclose(wrapped(pixel_values=images).logits, logits[0], atol=1e-6))
    print(torch.allclose(bert(torch.arange(24).view(2, 12)).logits, logits[1], atol=1e-6))
assert "sparse_ft" not in sys.modules
"""


@pytest.mark.parametrize("upload_mode", ["regular", "lfs"])
def test_push_and_stock_load(hub, run_client, upload_mode):
    hub.upload_mode = upload_mode
    lines = run_client(PUSH.format(tests=str(TESTS), read_token=READ_TOKEN)).splitlines()
    assert lines[0].startswith(f"{hub.endpoint}/user/resnet/commit/")
    assert lines[1].startswith(f"{hub.endpoint}/user/bert/commit/")
    assert lines[2].startswith(f"{hub.endpoint}/user/bert/commit/")
    assert lines[3] == f"{hub.endpoint}/user/bert/discussions/1"
    assert lines[4:6] == ["True", "False"]
    assert "the Hub does not accept the token for 'user/other'" in lines[6]
    assert "may not write to 'user/other'" in lines[7]
    assert len(lines) == 9 and "hf_" not in "".join(lines[6:])

    files = {"README.md", "config.json", "model.safetensors", "sparse_ft.json"}
    files |= {"sparse/config.json", "sparse/model.safetensors"}
    assert set(hub.files("user/resnet")) == files
    assert set(hub.files("user/bert")) == set(hub.files("user/bert", "tuned")) == files
    assert hub.files("user/bert", "refs/pr/1")["README.md"] == b"# Changed" != hub.files("user/bert")["README.md"]
    assert hub.repositories["user/bert"].private and not hub.repositories["user/resnet"].private
    assert "num_classes" not in json.loads(hub.files("user/resnet")["config.json"])["model_args"]
    assert b'hf-hub:user/resnet"' in hub.files("user/resnet")["README.md"]
    card = hub.files("user/bert")["README.md"]
    assert b'from_pretrained("user/bert")' in card and b"USER/NAME" not in card
    assert {"config.json", "sparse/config.json", "sparse/model.safetensors"} <= set(hub.files("user/small"))
    assert "model.safetensors" not in hub.files("user/small")
    exact, rounded = (hub.files(f"user/{name}")["sparse/model.safetensors"] for name in ("bert", "small"))
    assert len(rounded) < len(exact)
    card = ModelCard(hub.files("user/small")["README.md"].decode())
    assert card.data.library_name == "sparse_ft" and "compact form alone" in card.text
    assert [line for line in card.text.splitlines() if "from_pretrained" in line] == [
        'model = BertForSequenceClassification.from_pretrained("user/small", subfolder="sparse")',
        'model = sparse_ft.from_pretrained("user/small")',
    ]

    stock = run_client(STOCK, home="stock")
    assert stock.splitlines() == ["class 3"] + 6 * ["True"]


def test_push_needs_a_model_and_a_token(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(ModelError, match="has no model to push: it needs config.json and model.safetensors"):
        push_to_hub(tmp_path, "user/model")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="metrics: only for a model"):
        push_to_hub(tmp_path, "user/model", metrics={})
    with pytest.raises(ModelError, match="revision or create_pr, not both"):
        push_to_hub(tmp_path, "user/model", revision="tuned", create_pr=True)
    monkeypatch.setattr(push, "get_token", lambda: None)
    with pytest.raises(ModelError, match="needs a Hub token: log in with `hf auth login` or set HF_TOKEN"):
        push_to_hub(tmp_path, "user/model")
