"""Real checkpoints and datasets, where `SPARSE_FT_SHARED` (default `../shared`) has them."""

import copy
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sparse_ft

SHARED = Path(os.environ.get("SPARSE_FT_SHARED", "../shared")) / "data"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there (SPARSE_FT_SHARED names the folder of shared data)")
    return path


@torch.no_grad()
def test_pretrained_llama_gives_the_same_logits_and_text() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared("checkpoints/stories260K_hf")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = AutoTokenizer.from_pretrained(folder)("Once upon a time", return_tensors="pt")
    sparse_ft.prune(model, 0.6)
    dense = copy.deepcopy(model)
    report = sparse_ft.convert(model, policy="always")
    assert len(report.converted) == 35
    torch.testing.assert_close(model(**tokens).logits, dense(**tokens).logits, rtol=1e-4, atol=1e-4)
    text = [m.generate(**tokens, max_new_tokens=20, do_sample=False) for m in (model, dense)]
    assert torch.equal(*text)


@torch.no_grad()
def test_pretrained_mobilenet_knows_images_when_a_part_of_it_is_sparse() -> None:
    from timm.models.efficientnet import _gen_mobilenet_v1

    from sparse_ft.data import load_data

    settings = {"pad_type": "same", "norm_layer": partial(nn.BatchNorm2d, eps=1e-3)}
    model = _gen_mobilenet_v1("mobilenetv1_100", 0.25, **settings).eval()
    weights = shared("checkpoints/mobilenetv1_025_imagenet_keras.pth")
    model.load_state_dict(torch.load(weights, weights_only=True))
    split = load_data(str(shared("imagenette224"))).eval.select(range(32))
    pixels = [np.asarray(row["image"].convert("RGB")) for row in split.rows]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    classes = torch.tensor([0, 217, 482, 491, 497, 566, 569, 571, 574, 701])  # of ImageNet, by label
    labels = torch.tensor(split.labels)
    sparse_ft.prune(model, 0.2)
    expected = model(images)
    sparse_ft.convert(model, policy="always", min_sparsity=0.1)
    logits = model(images)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert (logits[:, classes].argmax(1) == labels).float().mean() > 0.8
