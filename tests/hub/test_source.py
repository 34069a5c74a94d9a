import json

import pytest
from huggingface_hub import errors

from sparse_ft.hub import ModelError, resolve
from sparse_ft.hub.bundled import BUNDLED_MODELS
from sparse_ft.hub.errors import explain_hub_error


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    return tmp_path / "model"


def test_local_folder(folder, monkeypatch):
    assert resolve(folder).folder == folder
    assert resolve(f"local-dir:{folder}").folder == folder
    monkeypatch.chdir(folder.parent)
    assert resolve("model").folder.resolve() == folder
    assert resolve("./model").folder.resolve() == folder


def test_bundled_name_is_its_folder_and_a_path_never_is():
    assert resolve("resnet20-cifar10").folder == BUNDLED_MODELS["resnet20-cifar10"]
    with pytest.raises(ModelError, match="does not exist"):
        resolve("./resnet20-cifar10")


def test_timm_architecture():
    source = resolve("timm/resnet18")
    assert source.architecture == "resnet18" and source.folder is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no config.json"),
        (["checkpoint-20/config.json", "checkpoint-100/config.json"], r"did you mean '.*checkpoint-100'"),
        (["config.json"], "has no weights"),
        (["config.json", "training_args.bin"], "has no weights"),
        (["config.json", "pytorch_model.bin"], r"only pickled weights \(pytorch_model.bin\).*sparse-ft import"),
    ],
)
def test_folder_without_a_model(tmp_path, files, message):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(ModelError, match=message) as caught:
        resolve(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "../none", "a/b/c"])
def test_missing_folder(name):
    with pytest.raises(ModelError, match="does not exist; bundled models: resnet20-cifar10"):
        resolve(name)


def test_file_is_not_a_folder(folder):
    with pytest.raises(ModelError, match="is a file; give the folder"):
        resolve(folder / "config.json")


def test_hub(hub, run_client):
    model = {"config.json": b"{}", "model.safetensors": b"weights"}
    hub.add_repository("user/full", {**model, "onnx/model.onnx": b"", "flax.msgpack": b"", "vocab.txt": b""})
    hub.add_repository("user/small", {"config.json": b"{}", "sparse/model.safetensors": b"weights"})
    hub.add_repository("user/pickle", {"config.json": b"{}", "pytorch_model.bin": b""})
    hub.add_repository("user/empty", {"README.md": b""})
    hub.add_repository("user/secret", model, private=True)
    hub.add_repository("timm/resnet18.tag", model)
    hub.add_repository("timm/resnet18.a1_in1k", model)  # what timm 1.0 has as the default weights of resnet18
    names = ["user/full", "hf-hub:user/full@main", "user/small", "timm/resnet18.tag"]
    names += ["user/full@nowhere", "user/pickle", "user/empty", "user/secret", "user/typo"]
    names += ["timm/resnet81", "resnet18", "a b/c"]
    code = f"""
    from sparse_ft.hub import ModelError, resolve
    for name in {names}:
        try:
            source = resolve(name)
            print(source.hub_id, *sorted(p.relative_to(source.folder).as_posix() for p in source.folder.rglob("*.*")))
        except ModelError as error:
            print(error)

    print(resolve("timm/resnet18", pretrained=True).hub_id)
    from huggingface_hub import constants
    constants.HF_HUB_OFFLINE = True
    print(resolve("user/full").folder.name)
    constants.HF_HUB_OFFLINE = False
    constants.ENDPOINT = "http://127.0.0.1:9"
    try:
        resolve("user/absent")
    except ModelError as error:
        print(error)
    """
    lines = run_client(code, token=None).splitlines()
    assert lines[0] == "user/full config.json model.safetensors vocab.txt"
    assert lines[1] == lines[0]
    assert lines[2] == "user/small config.json sparse/model.safetensors"
    assert lines[3] == "timm/resnet18.tag config.json model.safetensors"
    expected = [
        "has no branch, tag or commit 'nowhere'",
        "has only pickled weights (pytorch_model.bin)",
        "'user/empty' on the Hub has no config.json",
        "if it is private, log in",
        "no model 'user/typo'",
        "names that exist: timm/resnet18",
        "write timm/resnet18",
        "not a valid Hub id",
        "timm/resnet18.a1_in1k",
        hub.repositories["user/full"].refs["main"],  # from the cache
        "not in the local cache and the Hub cannot be reached",
    ]
    assert len(lines) == 4 + len(expected)
    for line, part in zip(lines[4:], expected, strict=True):
        assert part in line


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.OfflineModeIsEnabled("offline"), "not in the local cache and the Hub cannot be reached"),
        (errors.LocalEntryNotFoundError("cut"), "not in the local cache and the Hub cannot be reached"),
        (errors.LocalTokenNotFoundError("none"), "no Hub token: log in"),
        (ValueError("Illegal header value b'Bearer hf_abcDEF123'"), "Illegal header value b'Bearer <token>'"),
        (ValueError("Illegal header value b'Bearer other_kind'"), "Illegal header value b'Bearer <token>'"),
        (RuntimeError(), "RuntimeError"),
        (RuntimeError("first line\nsecond line"), "failed: first line"),
    ],
)
def test_errors_are_one_line_without_a_token(error, message):
    text = str(explain_hub_error(error, "user/model"))
    assert message in text and "\n" not in text and "hf_abc" not in text and "other_kind" not in text
