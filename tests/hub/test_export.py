"""Exports compute what the model computes, on real inputs, and keep every zero."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import images, tiny_bert, tiny_resnet, tokens

import sparse_ft
from sparse_ft.cli import main
from sparse_ft.hub import ModelError, load_model
from sparse_ft.hub.export import export_onnx, export_program
from sparse_ft.masks import mask_state
from sparse_ft.nn import SparseLinear

SHARED = Path(os.environ.get("SPARSE_FT_SHARED", "../shared"))
STORIES = SHARED / "data" / "checkpoints" / "stories260K_hf"


def needs_onnx():
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed")


def test_onnx_of_the_bundled_model_on_real_images(tmp_path, capsys):
    """Through the command line; handwritten digits are the images that come with scikit-learn."""
    needs_onnx()
    import onnxruntime

    file = tmp_path / "resnet20.onnx"
    arguments = ["export", "resnet20-cifar10", "--dataset", "digits", "--batch-size", "4", "--output", str(file)]
    assert main(arguments) == 0, capsys.readouterr().err
    assert "258,321 zeros kept" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    model = load_model("resnet20-cifar10").eval()
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    found = session.run(["logits"], {"input": x.numpy()})[0]
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4 * float(expected.abs().max()))
    assert [path.name for path in tmp_path.iterdir()] == ["resnet20.onnx"]


def test_onnx_of_a_converted_text_classifier(tmp_path):
    needs_onnx()
    model = tiny_bert()
    sparse_ft.convert(model, policy="always")
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens()), "labels": torch.tensor([0, 1])}
    result = export_onnx(model, tmp_path / "bert.onnx", inputs)
    assert result.inputs == {"input_ids": [2, 12], "attention_mask": [2, 12]}
    assert result.zeros == sum(int((~mask).sum()) for mask in mask_state(model).values())
    assert result.difference < 1e-4
    assert isinstance(model.bert.encoder.layer[0].output.dense, SparseLinear), "the model itself stays sparse"


def test_program_of_a_language_model_on_real_text(tmp_path):
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES} is not there: set SPARSE_FT_SHARED")
    from transformers import AutoTokenizer

    model = load_model(STORIES)
    sparse_ft.prune(model, 0.7)
    text = AutoTokenizer.from_pretrained(STORIES)(["Once upon a time there was a"] * 2, return_tensors="pt")
    result = export_program(model, tmp_path / "stories.pt2", {"input_ids": text["input_ids"]})
    assert result.difference < 1e-5 and result.zeros > 100_000
    read = torch.export.load(tmp_path / "stories.pt2").module()
    with torch.no_grad():
        assert torch.allclose(read(text["input_ids"][:1]), model(text["input_ids"][:1]).logits, atol=1e-4)


def test_dense_export_opens_without_us(tmp_path, capsys):
    import timm

    assert main(["export", "resnet20-cifar10", "--format", "dense", "--output", str(tmp_path / "out")]) == 0
    stock = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    ours = load_model("resnet20-cifar10")
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), ours.state_dict().values(), strict=True))


class Changed(torch.nn.Module):
    """A model whose export is not what it computes: the difference must be seen."""

    def __init__(self):
        super().__init__()
        self.body = tiny_resnet()

    def forward(self, x):
        return self.body(x) + (0.0 if torch.compiler.is_compiling() else 1.0)


def test_an_export_that_differs_is_not_kept(tmp_path):
    with pytest.raises(ModelError, match="computes something else: outputs differ by"):
        export_program(Changed(), tmp_path / "m.pt2", images())
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported(tmp_path):
    model = tiny_resnet()
    with pytest.raises(ModelError, match="a batch of at least two"):
        export_program(model, tmp_path / "m.pt2", images()[:1])
    with pytest.raises(ModelError, match="is a .pt2 file"):
        export_program(model, tmp_path / "m.onnx", images())

    class Strange(torch.nn.Module):
        def forward(self, x):
            return x * int(x.sum())

    with pytest.raises(ModelError, match="this Strange cannot be exported by torch.export") as caught:
        export_program(Strange(), tmp_path / "m.pt2", images())
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
