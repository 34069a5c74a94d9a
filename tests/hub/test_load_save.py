"""A sparse model through a folder: saved by us, read back by us and by the stock loaders."""

import json
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tiny_models import images, tiny_bert, tiny_resnet, tokens
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
)

import sparse_ft
from sparse_ft.hub import ModelError, from_pretrained, load_model, save_pretrained
from sparse_ft.hub.bitmap import MASK_FILE
from sparse_ft.hub.compact import COMPACT_FILE
from sparse_ft.masks import mask_state
from sparse_ft.nn import SparseConv2d, SparseLinear

RECIPE = "modifiers:\n  - !ConstantPruningModifier\n    params: __ALL_PRUNABLE__\n"
LABELS = [f"class {index}" for index in range(10)]


@pytest.fixture
def resnet():
    model = tiny_resnet()
    sparse_ft.convert(model, policy="always")
    return model


@pytest.fixture
def bert():
    model = tiny_bert()
    sparse_ft.convert(model, policy="always")
    return model


@torch.no_grad()
def logits(model, **inputs):
    model.eval()
    output = model(**inputs) if inputs else model(images())
    return getattr(output, "logits", output)


def close(left, right):
    return torch.allclose(left, right, atol=1e-5)


def test_timm_model(resnet, tmp_path):
    expected = logits(resnet)
    save_pretrained(resnet, tmp_path, label_names=LABELS)
    assert isinstance(resnet.layer1[0].conv1, SparseConv2d), "saving must not change the model"

    stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert close(logits(stock), expected)
    assert stock.pretrained_cfg["mean"] == [0.4, 0.5, 0.6]
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert close(logits(wrapped, pixel_values=images()), expected)
    assert list(wrapped.config.id2label.values()) == LABELS
    assert AutoImageProcessor.from_pretrained(tmp_path).data_config["mean"] == (0.4, 0.5, 0.6)

    ours = from_pretrained(tmp_path, policy="always")
    assert isinstance(ours.layer1[0].conv1, SparseConv2d)
    assert ours.layer1[0].conv1.nnz == resnet.layer1[0].conv1.nnz
    assert close(logits(ours), expected)


def test_transformers_model(bert, tmp_path):
    expected = logits(bert, input_ids=tokens())
    save_pretrained(bert, tmp_path, label_names=["no", "maybe", "yes"])
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert close(logits(stock, input_ids=tokens()), expected)
    assert stock.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    ours = from_pretrained(tmp_path, policy="always")
    assert isinstance(ours.bert.encoder.layer[0].intermediate.dense, SparseLinear)
    assert close(logits(ours, input_ids=tokens()), expected)


@pytest.mark.parametrize("convert", [False, True])
def test_wrapped_timm_model_is_saved_as_the_model_inside(resnet, tmp_path, convert):
    save_pretrained(resnet, tmp_path / "plain", label_names=LABELS)
    wrapped = from_pretrained(tmp_path / "plain", policy="always", for_trainer=True, convert=convert)
    output = wrapped.eval()(pixel_values=images(), labels=torch.tensor([1, 2]))
    assert output.loss.requires_grad and output.logits.shape == (2, 10)
    assert isinstance(wrapped.timm_model.layer1[0].conv1, SparseConv2d) == convert
    save_pretrained(wrapped, tmp_path / "wrapped")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "wrapped" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


def test_model_that_transformers_wrapped_keeps_its_preprocessing(resnet, tmp_path):
    save_pretrained(resnet, tmp_path / "plain", label_names=LABELS)
    wrapped = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    save_pretrained(wrapped, tmp_path / "again")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "again"))
    assert first["pretrained_cfg"]["mean"] == second["pretrained_cfg"]["mean"]
    assert first["label_names"] == second["label_names"] == LABELS


def test_active_zeros_survive(resnet, tmp_path):
    layer = resnet.layer1[0].conv1
    with torch.no_grad():
        layer.weight[:3] = 0.0
    save_pretrained(resnet, tmp_path)
    assert (tmp_path / MASK_FILE).is_file()
    again = from_pretrained(tmp_path, policy="always", for_trainer=True).timm_model
    assert torch.equal(again.layer1[0].conv1.mask(), layer.mask())
    # A later save without such zeros must not leave the old masks beside its weights.
    with torch.no_grad():
        layer.weight[:3] = 1.0
    save_pretrained(resnet, tmp_path)
    assert not (tmp_path / MASK_FILE).exists()


def test_mask_that_contradicts_the_weights_is_refused(resnet, tmp_path):
    with torch.no_grad():
        resnet.layer1[0].conv1.weight[:3] = 0.0
    save_pretrained(resnet, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["layer1.0.conv1.weight"][:] = 1.0
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="layer1.0.conv1.weight has nonzero weights outside its mask"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_compact_form_alone_is_enough(kind, resnet, bert, tmp_path):
    model, inputs = (resnet, {}) if kind == "timm" else (bert, {"input_ids": tokens()})
    save_pretrained(model, tmp_path)
    dense_size = (tmp_path / "model.safetensors").stat().st_size
    assert (tmp_path / COMPACT_FILE).stat().st_size < 0.6 * dense_size
    (tmp_path / "model.safetensors").unlink()
    again = from_pretrained(tmp_path, policy="always")
    assert torch.equal(logits(again, **inputs), logits(model, **inputs))
    masks = mask_state(again)
    assert all(torch.equal(masks[name], mask) for name, mask in mask_state(model).items())


def test_damaged_compact_file_is_one_clear_line(resnet, tmp_path):
    save_pretrained(resnet, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / COMPACT_FILE).write_bytes(b"damaged")
    with pytest.raises(ModelError, match="not a safetensors file"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize("for_trainer", [False, True])
def test_another_number_of_classes_replaces_the_timm_classifier_alone(resnet, tmp_path, for_trainer):
    save_pretrained(resnet, tmp_path, label_names=LABELS)
    model = load_model(tmp_path, label_names=["cat", "dog"], for_trainer=for_trainer)
    inner = model.timm_model if for_trainer else model
    assert inner.fc.out_features == 2
    assert torch.equal(inner.layer1[0].conv1.weight, resnet.layer1[0].conv1.dense_weight())
    if for_trainer:
        assert model.config.id2label == {0: "cat", 1: "dog"} and model.num_labels == 2
    save_pretrained(model, tmp_path / "new")
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["label_names"] == ["cat", "dog"] and config["num_classes"] == 2
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "new").num_labels == 2


def test_another_number_of_labels_replaces_the_transformers_classifier_alone(bert, tmp_path):
    save_pretrained(bert, tmp_path)
    model = load_model(tmp_path, label_names=["a", "b"])
    assert model.classifier.out_features == 2 and model.config.label2id == {"a": 0, "b": 1}
    dense = bert.bert.encoder.layer[0].intermediate.dense
    assert torch.equal(model.bert.encoder.layer[0].intermediate.dense.weight, dense.dense_weight())
    same = load_model(tmp_path, num_labels=3)
    assert torch.equal(same.classifier.weight, bert.classifier.weight)


def test_language_model_gets_a_classifier(bert, tmp_path):
    BertForMaskedLM(bert.config).save_pretrained(tmp_path)
    assert type(load_model(tmp_path)).__name__ == "BertForMaskedLM"
    assert type(load_model(tmp_path, num_labels=2)).__name__ == "BertForSequenceClassification"
    assert type(load_model(tmp_path, task="token-classification")).__name__ == "BertForTokenClassification"


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_other_shapes_than_the_config_asks_for_are_named(kind, resnet, bert, tmp_path):
    model = resnet if kind == "timm" else bert
    save_pretrained(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "layer2.0.conv1.weight" if kind == "timm" else "bert.encoder.layer.1.output.dense.weight"
    shape = tuple(weights[name].shape)
    weights[name] = weights[name][:-1].contiguous()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path, num_labels=4)
    assert name in str(caught.value) and str(shape) in str(caught.value) and "\n" not in str(caught.value)
    assert str((shape[0] - 1, *shape[1:])) in str(caught.value)


def test_classifier_of_another_size_is_replaced_only_on_demand(bert, tmp_path):
    save_pretrained(bert, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.weight"] = torch.zeros(7, 32)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"classifier.weight has shape \(7, 32\)"):
        load_model(tmp_path)


@pytest.mark.parametrize("rename", ["lost", "foreign"])
def test_missing_and_foreign_tensors_are_named(resnet, tmp_path, rename):
    save_pretrained(resnet, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    tensor = weights["layer1.0.conv2.weight"].clone()
    if rename == "lost":
        del weights["layer1.0.conv2.weight"]
    else:
        weights["layer9.weight"] = tensor
    save_file(weights, tmp_path / "model.safetensors")
    message = "the weights file lacks layer1.0.conv2.weight" if rename == "lost" else "no place for layer9.weight"
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_weights_of_another_model_are_refused(bert, tmp_path):
    save_pretrained(bert, tmp_path)
    save_file({"foreign": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="none of the weights of BertForSequenceClassification"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold an object"),
        ('{"architecture": "resnet999", "pretrained_cfg": {}}', "no architecture 'resnet999'"),
        ('{"architecture": "resnet18", "pretrained_cfg": 3}', "does not describe a timm model"),
        ('{"architecture": ["resnet18"], "pretrained_cfg": {}}', "no architecture"),
        ('{"architecture": "resnet18", "pretrained_cfg": {"no_such": 1}}', "no_such"),
        ('{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": {"depth": 1}}', "depth"),
        ('{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": [1]}', "does not describe a timm model"),
        (
            '{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": {"checkpoint_path": "/etc/passwd"}}',
            "model_args may not hold 'checkpoint_path'",
        ),
        (
            '{"architecture": "resnet18", "pretrained_cfg": {}, "model_args": {"pretrained_strict": false}}',
            "model_args may not hold 'pretrained_strict'",
        ),
        ('{"model_type": "no_such_type"}', "no_such_type"),
        ('{"model_type": "bert", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}', "contains custom code"),
        ("{}", "config.json"),
    ],
)
def test_config_that_describes_nothing(resnet, tmp_path, config, message):
    save_pretrained(resnet, tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 0}, "at least 1"),
        ({"label_names": ["a", "a"]}, "a name twice"),
        ({"label_names": ["a", "b"], "num_labels": 3}, "num_labels is 3, but there are 2"),
        ({"task": "text-classification"}, "its task is image-classification"),
        ({"model_args": {"layers": (1, 1, 1, 1)}}, "has its own in config.json"),
    ],
)
def test_wrong_options(resnet, tmp_path, options, message):
    save_pretrained(resnet, tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path, **options)


def test_unknown_task(bert, tmp_path):
    save_pretrained(bert, tmp_path)
    with pytest.raises(ModelError, match="unknown task 'cooking'; known tasks: image-classification"):
        load_model(tmp_path, task="cooking")
    with pytest.raises(ModelError, match="no bert model for the task image-classification"):
        load_model(tmp_path, task="image-classification")


def test_timm_architecture_with_random_weights():
    model = load_model("timm/resnet18", num_labels=4, model_args={"layers": (1, 1, 1, 0), "channels": (8, 8, 8, 8)})
    assert model.fc.out_features == 4 and len(model.layer1) == 1


def test_timm_model_that_cannot_be_described_or_wrapped(tmp_path):
    strange = load_model("timm/resnet18", model_args={"layers": (1, 1, 1, 0), "norm_layer": torch.nn.BatchNorm2d})
    with pytest.raises(ModelError, match="config.json cannot describe this ResNet: .*norm_layer"):
        save_pretrained(strange, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_pretrained(tiny_resnet(num_classes=0), tmp_path / "features")
    with pytest.raises(ModelError, match="no classifier: give num_labels"):
        load_model(tmp_path / "features", for_trainer=True)
    assert load_model(tmp_path / "features", for_trainer=True, num_labels=2).num_labels == 2


def test_unconverted_model_of_neither_library_is_refused(tmp_path):
    with pytest.raises(ModelError, match="Linear is neither a timm nor a transformers model"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_number_of_labels_is_refused(resnet, bert, tmp_path):
    for model, classes in ((resnet, 10), (bert, 3)):
        with pytest.raises(ModelError, match=f"there are 2 label_names, but the model has {classes} classes"):
            save_pretrained(model, tmp_path / "out", label_names=["a", "b"])
    assert not (tmp_path / "out").exists()


def test_card_and_info(resnet, tmp_path):
    save_pretrained(
        resnet,
        tmp_path,
        metrics={"accuracy": 0.875},
        recipe=RECIPE,
        card={
            "license": "mit",
            "datasets": "uoft-cs/cifar10",
            "base_model": "user/base",
            "model_id": "user/tiny",
            "speed": {"dense_ms": 12.0, "sparse_ms": 4.0, "processor": "Some CPU", "threads": 2},
        },
        extra={"method": "magnitude"},
    )
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "timm" and data["pipeline_tag"] == "image-classification"
    assert data["tags"] == ["sparse_ft", "sparsity"] and data["license"] == "mit"
    assert data["base_model_relation"] == "finetune"
    assert card.data.eval_results[0].metric_value == 0.875
    for line in (
        'timm.create_model("hf-hub:user/tiny", pretrained=True)',
        'AutoModelForImageClassification.from_pretrained("user/tiny")',
        'sparse_ft.from_pretrained("user/tiny")',
        "| accuracy | 0.875 |",
        "| `layer1.0.conv1` | 8×64×3×3 | 461 | 90.00 % |",
        'AutoModelForImageClassification.from_pretrained("user/tiny", subfolder="sparse")',
        "| training step | 4.0 ms; dense 12.0 ms, 3.00 times as long |",
        "on the machine that trained the model: Some CPU, 2 threads.",
        f"```yaml\n{RECIPE.strip()}\n```",
        "* `ConstantPruningModifier`: Iofinova et al. 2022, arXiv 2111.13445",
        "SparseProp, arXiv 2302.04852",
    ):
        assert line in card.text
    assert (tmp_path / "recipe.yaml").read_text() == RECIPE
    info = json.loads((tmp_path / "sparse_ft.json").read_text())
    assert info["speed"]["sparse_ms"] == 4.0
    assert info["method"] == "magnitude" and info["metrics"] == {"accuracy": 0.875}
    assert info["versions"]["sparse_ft"] == sparse_ft.__version__
    layers = {layer["name"]: layer for layer in info["sparsity"]["layers"]}
    assert layers["layer1.0.conv1"]["nnz"] == resnet.layer1[0].conv1.nnz
    assert '"shape": [8, 64, 3, 3]' in (tmp_path / "sparse_ft.json").read_text()


def test_results_of_a_card_belong_to_a_dataset(resnet, tmp_path):
    def results(**card):
        save_pretrained(resnet, tmp_path, metrics={"accuracy": 0.875}, card=card)
        data = ModelCard.load(tmp_path / "README.md").data  # reads the model-index as the Hub does
        return [(each.dataset_type, each.dataset_name, each.metric_value) for each in data.eval_results or ()]

    assert results(datasets=["uoft-cs/cifar10"]) == [("uoft-cs/cifar10", "uoft-cs/cifar10", 0.875)]
    assert results(datasets="uoft-cs/cifar10", dataset_name="CIFAR-10") == [("uoft-cs/cifar10", "CIFAR-10", 0.875)]
    assert results(dataset_name="My photos") == [("my-photos", "My photos", 0.875)]
    assert results() == [] and "| accuracy | 0.875 |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("text", ["user/name", "hf-hub:user/name", "recipe.yaml"])
def test_the_text_of_a_recipe_is_never_taken_for_its_name(resnet, tmp_path, monkeypatch, text):
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **kwargs: asked.append(args))
    monkeypatch.setattr("sparse_ft.recipes.source._read_file", lambda *args, **kwargs: asked.append(args))
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").touch()
    save_pretrained(resnet, tmp_path / "out", recipe=text)
    assert not asked
    assert text in ModelCard.load(tmp_path / "out" / "README.md").text


def test_card_of_a_transformers_model(bert, tmp_path):
    save_pretrained(bert, tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "library_name: transformers" in text and "pipeline_tag: text-classification" in text
    assert 'BertForSequenceClassification.from_pretrained("USER/NAME")' in text and "timm" not in text
    with pytest.raises(ModelError, match="unknown entry 'licence'"):
        save_pretrained(bert, tmp_path, card={"licence": "mit"})
    with pytest.raises(ModelError, match="may not replace the entry 'sparsity'"):
        save_pretrained(bert, tmp_path, extra={"sparsity": 1})


def test_stale_shards_are_removed(bert, tmp_path):
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    save_pretrained(bert, tmp_path)
    names = {path.name for path in Path(tmp_path).iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "notes.txt", "sparse", "sparse_ft.json"}
    save_pretrained(bert, tmp_path, compact=False)
    assert not list((tmp_path / "sparse").iterdir()), "a compact form of other weights must not stay"


def test_image_model_of_transformers_is_measured_on_images_of_its_size(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_channels=1, **sizes))
    sparse_ft.prune(model, 0.9)
    save_pretrained(model, tmp_path)
    assert from_pretrained(tmp_path).config.image_size == 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compact_and_dense_weights_give_the_same_transformers_model(bert, tmp_path, dtype):
    # In another type the weights are copied, before they are all there: the model is built again.
    save_pretrained(bert, tmp_path)
    labels = {"task": "text-classification", "num_labels": 7, "convert": False, "dtype": dtype}
    models = []
    for form in ("dense", "compact"):
        torch.manual_seed(0)  # of the new classifier
        models.append(from_pretrained(tmp_path, form=form, **labels))
    dense, read = (model.state_dict() for model in models)
    assert dense.keys() == read.keys() and all(torch.equal(dense[name], read[name]) for name in dense)
    assert int(torch.count_nonzero(read["bert.encoder.layer.0.intermediate.dense.weight"]))
