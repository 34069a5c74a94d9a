"""Checkpoint files of other tools, through the entry points that a user has."""

import json
import os
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_models import images, tiny_bert, tokens
from torch import nn
from torch.nn.utils import prune as torch_prune

import sparse_ft
from sparse_ft.cli import main
from sparse_ft.hub import ModelError, from_pretrained, load_model, save_pretrained
from sparse_ft.masks import mask_state

ARGS = {"layers": (1, 1, 1, 0), "channels": (8, 16, 16, 16)}
TIMM = {"reference": "timm/resnet18", "model_args": ARGS}


def small_resnet(num_classes=7):
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=num_classes, **ARGS)


def pruned_convolutions(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d) and "layer" in name}


def logits(model, x=None):
    with torch.no_grad():
        return model.eval()(images() if x is None else x)


def test_torch_prune_state_keeps_active_zeros(tmp_path):
    model = small_resnet()
    for layer in pruned_convolutions(model).values():
        torch_prune.l1_unstructured(layer, "weight", 0.9)
    torch_prune.random_unstructured(model.fc, "bias", 0.5)
    first = model.layer1[0].conv1
    kept = first.weight_mask.nonzero()[0]
    with torch.no_grad():
        first.weight_orig[tuple(kept)] = 0.0
        first.weight_orig[first.weight_mask == 0] = 9.0  # what is pruned does not count
    model(images())  # the hooks compute .weight
    file = tmp_path / "pruned.pt"
    torch.save({"epoch": 3, "model": nn.DataParallel(model).state_dict()}, file)

    loaded = from_pretrained(file, policy="always", **TIMM)
    assert loaded.num_classes == 7, "the checkpoint tells the number of classes"
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    assert torch.equal(loaded.layer1[0].conv1.mask(), first.weight_mask.bool())
    assert loaded.layer1[0].conv1.mask()[tuple(kept)]
    assert load_model(file, num_labels=3, **TIMM).num_classes == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer1.0.conv1.weight_mask"), "layer1.0.conv1.weight_mask is missing"),
        (lambda s: s["layer1.0.conv1.weight_mask"].fill_(0.5), "other numbers than 0 and 1"),
        (lambda s: s.update({"layer1.0.conv1.weight_mask": torch.ones(3)}), r"has shape \(3,\), its weight"),
        (lambda s: s.update(extra=torch.ones(1)), "the checkpoint has extra"),
        (lambda s: s.pop("fc.bias"), "the model needs fc.bias"),
        (lambda s: s.update({"conv1.weight": torch.ones(1, 2)}), r"conv1.weight has shape \(1, 2\)"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    model = small_resnet()
    torch_prune.l1_unstructured(model.layer1[0].conv1, "weight", 0.5)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "m.pth")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(tmp_path / "m.pth", **TIMM)
    assert "\n" not in str(caught.value) and "m.pth" in str(caught.value)


def test_n_of_m_masks_of_asp(tmp_path):
    model = small_resnet()
    state = model.state_dict()
    weight = state["layer2.0.conv1.weight"]
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[:, ::4] = mask[:, 1::4] = True
    torch.save(state | {"layer2.0.conv1.__weight_mma_mask": mask}, tmp_path / "asp.pth")
    loaded = load_model(tmp_path / "asp.pth", **TIMM)
    assert torch.equal(loaded.layer2[0].conv1.weight, weight * mask)
    torch.save({"layer2.0.conv1.__weight_mma_mask": mask}, tmp_path / "lost.pth")
    with pytest.raises(ModelError, match="its weight"):
        load_model(tmp_path / "lost.pth", **TIMM)


@pytest.mark.parametrize("structure", ["2:4", "1:4", "4:8", "3:16"])
def test_n_of_m_is_recognised(tmp_path, capsys, structure):
    model = tiny_bert(sparsity=0.0)
    sparse_ft.prune(model, structure=structure)
    save_pretrained(model, tmp_path / "bert")
    arguments = ["import", str(tmp_path / "bert" / "model.safetensors"), "--reference", str(tmp_path / "bert")]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert f"{structure} in 12 layers" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "sparse_ft.json").read_text())["structures"] == {structure: 12}


def test_sparseml_names_and_recipe(tmp_path, capsys):
    """Names as sparseml 1.8.0 gives them to a ResNet of its own."""
    model = small_resnet()
    sparse_ft.prune(model, 0.9)

    def zoo_name(name):
        name = name.replace("conv1.weight", "input.conv.weight") if name == "conv1.weight" else name
        name = f"input.bn.{name.removeprefix('bn1.')}" if name.startswith("bn1.") else name
        for stage in range(1, 4):
            name = name.replace(f"layer{stage}.", f"sections.{stage - 1}.")
        name = name.replace("downsample.0.", "identity.conv.").replace("downsample.1.", "identity.bn.")
        return name.replace("fc.", "classifier.fc.")

    state = {zoo_name(name): tensor for name, tensor in model.state_dict().items()}
    assert "sections.1.0.identity.conv.weight" in state
    recipe = "modifiers:\n  - !SetLearningRateModifier\n    learning_rate: 0.1\n"
    torch.save({"state_dict": state, "recipe": recipe, "arch_key": "resnet18"}, tmp_path / "zoo.pth")
    loaded = load_model(tmp_path / "zoo.pth", **TIMM)
    assert torch.equal(logits(loaded), logits(model))
    save_pretrained(small_resnet(), tmp_path / "reference")
    arguments = ["import", str(tmp_path / "zoo.pth"), "--reference", str(tmp_path / "reference")]
    assert main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "recipe.yaml").read_text() == recipe
    assert json.loads((tmp_path / "out" / "sparse_ft.json").read_text())["imported_from"] == "zoo.pth"
    assert torch.equal(logits(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)), logits(model))

    torch.save(state | {"input.conv.activation_post_process.scale": torch.ones(1)}, tmp_path / "quantised.pth")
    with pytest.raises(ModelError, match="quantised"):
        load_model(tmp_path / "quantised.pth", **TIMM)


def test_sparseprop_needs_the_dense_reference(tmp_path):
    model = small_resnet()
    sparse_ft.prune(model, 0.9)
    save_pretrained(model, tmp_path / "dense")
    state = dict(model.state_dict())
    for name in pruned_convolutions(model):
        weight = state.pop(f"{name}.weight")
        state[f"{name}.W_val"] = weight[weight != 0] * 2  # trained since
    torch.save(state, tmp_path / "sp.pt")
    loaded = load_model(tmp_path / "sp.pt", reference=tmp_path / "dense")
    assert torch.equal(loaded.layer1[0].conv2.weight, model.layer1[0].conv2.weight * 2)
    with pytest.raises(ModelError, match="values without positions"):
        load_model(tmp_path / "sp.pt", **TIMM)  # random weights: no zeros


def test_sparseprop_itself(tmp_path):
    sparseprop = pytest.importorskip("sparseprop.modules", reason="sparseprop is not installed")
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    with torch.no_grad():
        for layer in (dense[0], dense[2]):
            layer.weight *= torch.rand_like(layer.weight) < 0.2
    theirs = nn.Sequential(
        sparseprop.SparseConv2d.from_dense(dense[0]), nn.Flatten(), sparseprop.SparseLinear.from_dense(dense[2])
    )
    with torch.no_grad():
        theirs[0].W_val.mul_(3)
        theirs[2].W_val.add_(1)
    torch.save(theirs.state_dict(), tmp_path / "sp.pt")
    ours = load_model(tmp_path / "sp.pt", reference=dense)
    assert torch.equal(ours[0].weight, theirs[0].to_dense().weight)
    assert torch.equal(ours[2].weight, theirs[2].to_dense().weight)


def test_transformers_reference_without_weights(tmp_path):
    model = tiny_bert()
    save_pretrained(model, tmp_path / "bert", compact=False)
    (tmp_path / "bert" / "model.safetensors").unlink()
    state = {name.replace("bert.", "encoder."): tensor for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights.*import .*pytorch_model.bin --reference .*bert"):
        load_model(tmp_path / "bert")
    options = {"reference": str(tmp_path / "bert"), "renames": {r"^encoder\.": "bert."}}
    loaded = load_model(tmp_path / "bert" / "pytorch_model.bin", **options)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    del state["classifier.weight"]
    torch.save(state, tmp_path / "bert" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="the weights lack classifier.weight"):
        load_model(tmp_path / "bert" / "pytorch_model.bin", **options)
    assert load_model(tmp_path / "bert" / "pytorch_model.bin", num_labels=2, **options).num_labels == 2


def test_shards_by_their_index(tmp_path):
    model = small_resnet()
    state = model.state_dict()
    names = sorted(state)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert torch.equal(logits(load_model(path, **TIMM)), logits(model))
    for wrong in ("../a.safetensors", "/etc/passwd", "a.safetensors/../b.safetensors", "c.txt", 3):
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], names[0]: wrong}}))
        with pytest.raises(ModelError, match="only weight files beside the index"):
            load_model(path, **TIMM)


def test_zero_threshold(tmp_path):
    model = small_resnet()
    with torch.no_grad():
        model.layer1[0].conv1.weight[:4] = 1e-7
    torch.save(model.state_dict(), tmp_path / "m.pth")
    assert torch.count_nonzero(load_model(tmp_path / "m.pth", **TIMM).layer1[0].conv1.weight[:4])
    loaded = load_model(tmp_path / "m.pth", zero_threshold=1e-6, **TIMM)
    assert not torch.count_nonzero(loaded.layer1[0].conv1.weight[:4])
    assert not mask_state(loaded)["layer1.0.conv1.weight"][:4].any()
    assert torch.equal(loaded.conv1.weight, model.conv1.weight), "the stem is none of the pruned layers"
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ModelError, match="zero_threshold must be"):
            load_model(tmp_path / "m.pth", zero_threshold=wrong, **TIMM)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/sparse_ft_was_here",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": torch.ones(1)}, "x": Evil()}, "posix.system"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"a": 1}, "holds no state dict"),
        ([torch.ones(2)], "holds no state dict"),
        ({"a": torch.ones(1).expand(10**9)}, "not so many numbers in the file"),
        ({"a": torch.ones(2).to_sparse()}, "not an ordinary dense tensor"),
        ({"a": torch.ones(2, device="meta")}, "not an ordinary dense tensor"),
    ],
)
def test_pickles_that_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(ModelError, match=message) as caught:
        load_model(tmp_path / "m.pth", **TIMM)
    assert "\n" not in str(caught.value)
    assert not os.path.exists("/tmp/sparse_ft_was_here")


def test_archives_that_unpack_to_more_than_they_are(tmp_path):
    torch.save({"a": torch.zeros(100_000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "m.pth", "w") as packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part.filename), zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelError, match="is compressed, which torch never writes"):
        load_model(tmp_path / "m.pth", **TIMM)


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04 broken"])
def test_damaged_files(tmp_path, content):
    (tmp_path / "m.pth").write_bytes(content)
    with pytest.raises(ModelError, match="m.pth"):
        load_model(tmp_path / "m.pth", **TIMM)


@pytest.mark.parametrize(
    ("renames", "message"),
    [
        ({"(": "x"}, "not a regular expression"),
        ({"nowhere": "x"}, "changes none of the names"),
        ({".*": "x"}, "two tensors the name"),
    ],
)
def test_renames_that_do_not_work(tmp_path, renames, message):
    torch.save(small_resnet().state_dict(), tmp_path / "m.pth")
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path / "m.pth", renames=renames, **TIMM)


def test_a_file_needs_a_reference_and_a_reference_a_file(tmp_path, capsys):
    torch.save(small_resnet().state_dict(), tmp_path / "m.pth")
    with pytest.raises(ModelError, match="give as reference a folder"):
        load_model(tmp_path / "m.pth")
    with pytest.raises(ModelError, match="is not a file"):
        load_model("resnet20-cifar10", reference="timm/resnet18")
    with pytest.raises(ModelError, match="give a reference, too"):
        load_model("resnet20-cifar10", renames={"a": "b"})
    assert main(["bench", str(tmp_path / "m.pth")]) == 1
    assert "give as reference" in capsys.readouterr().err
