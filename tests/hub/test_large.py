"""Memory of saving and loading, against the size of the model: no second copy of it, in any form."""

import json
from pathlib import Path

import pytest

# A part of each program: a random Llama, and the largest anonymous memory (not that of mapped files) beyond the start.
COMMON = """
import json, re, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import sparse_ft
from sparse_ft import convert, from_pretrained, prune, push_to_hub, save_pretrained  # loads all that they need
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(vocab_size={vocabulary}, hidden_size={hidden}, intermediate_size={intermediate},
                     num_hidden_layers={layers}, num_attention_heads=16, num_key_value_heads=8,
                     architectures=["LlamaForCausalLM"])
with torch.device("meta"):
    SIZE = 4 * sum(p.numel() for p in LlamaForCausalLM(CONFIG).parameters())

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

class Peak:
    def __enter__(self):
        self.before = self.most = anonymous()
        self.on = True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self
    def watch(self):
        while self.on:
            self.most = max(self.most, anonymous())
            time.sleep(0.005)
    def __exit__(self, *error):
        self.on = False
        self.thread.join()

def report(**figures):
    print("FIGURES", json.dumps({{"size": SIZE, **figures}}))
"""

SAVE = """
torch.manual_seed(0)
empty = anonymous()
model = LlamaForCausalLM(CONFIG)
prune(model, 0.9)
convert(model, policy="always")
held = anonymous() - empty
x = torch.arange(8).view(1, 8)
with torch.no_grad():
    torch.save(model.eval()(x).logits, "logits.pt")
with Peak() as peak:
    save_pretrained(model, "model", max_shard_size="{shard}")
report(held=held, peak=peak.most - empty, layers=sum(type(m).__name__ == "SparseLinear" for m in model.modules()))
"""

LOAD = """
empty = anonymous()
with Peak() as peak:
    model = from_pretrained({name!r}, policy="always")
with torch.no_grad():
    difference = (model.eval()(torch.arange(8).view(1, 8)).logits - torch.load("logits.pt")).abs().max()
report(peak=peak.most - empty, held=anonymous() - empty, difference=float(difference))
"""

PUSH = """
empty = anonymous()
with Peak() as peak:
    push_to_hub("model", "user/large")
report(peak=peak.most - empty)
"""

SMALL = {"vocabulary": 2000, "hidden": 1024, "intermediate": 4096, "layers": 2, "shard": "20MB"}
BILLION = {"vocabulary": 32000, "hidden": 2048, "intermediate": 8192, "layers": 15, "shard": "500MB"}
SPARE = 40 * 2**20  # libraries that load, thread stacks, blocks of the allocator: next to nothing of a billion weights


def figures(output: str) -> dict[str, float]:
    return json.loads(next(line for line in output.splitlines() if line.startswith("FIGURES"))[len("FIGURES") :])


def program(text: str, scale: dict[str, object], **more: object) -> str:
    return (COMMON + text).format(**scale, **more)


def check(measured: dict[str, float], step: str, spare: int) -> None:
    print(
        step, {name: f"{value / measured['size']:.2f}" for name, value in measured.items() if name in ("peak", "held")}
    )
    assert measured["peak"] <= 1.3 * measured["size"] + spare, f"{step}: {measured}"


def save_push_load(scale: dict[str, object], spare: int, run_client, tmp_path: Path) -> None:
    saved = figures(run_client(program(SAVE, scale), timeout=3600))
    check(saved, "save", spare)
    assert saved["layers"] == 7 * int(str(scale["layers"]))
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 3
    check(figures(run_client(program(PUSH, scale), timeout=3600)), "push", spare)
    for step, name in (("load the folder", "model"), ("load from the Hub", "user/large")):
        loaded = figures(run_client(program(LOAD, scale, name=name), timeout=3600))
        check(loaded, step, spare)
        assert loaded["difference"] < 1e-3
        assert loaded["held"] < 0.8 * loaded["size"] + spare, "in native form, a tenth of the weights is kept"


def test_memory_of_saving_and_loading(hub, run_client, tmp_path):
    hub.upload_mode = "lfs"  # as the Hub takes weights
    save_push_load(SMALL, SPARE, run_client, tmp_path)


@pytest.mark.slow
def test_a_billion_parameters(hub, run_client, tmp_path):
    hub.upload_mode = "lfs"
    save_push_load(BILLION, 0, run_client, tmp_path)
