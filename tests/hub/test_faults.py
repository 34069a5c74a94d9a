"""What goes wrong between a client and the Hub: waited for, or one clear line, and never half a model."""

import itertools
import json

import pytest
from hub_server import WRITE_TOKEN, Blob, Fault

from sparse_ft.hub import ModelError
from sparse_ft.hub.publish import check_secrets, files_to_publish

FOLDER = {"config.json": b"{}", "model.safetensors": b"weights " * 1000, "README.md": b"# A model", "vocab.txt": b"a"}

CLIENT = """
import logging, sys, time
from pathlib import Path
logging.basicConfig(stream=sys.stdout)
time.sleep = lambda seconds: None
from sparse_ft.hub import ModelError, push, push_to_hub, resolve
push.write_compact_folder = lambda *args, **options: False  # these weights are none

def tried(name, call):
    try:
        print(name, "done:", call())
    except ModelError as error:
        print(name, "failed:", error)
"""
PUSH = """
before = {{path: path.read_bytes() for path in Path("run").rglob("*")}}
for name in {names}:
    tried(name, lambda: push_to_hub("run", "user/" + name))
print("unharmed", {{path: path.read_bytes() for path in Path("run").rglob("*")}} == before)
"""
LOAD = """
for name in {names}:
    def load():
        folder = resolve("user/" + name).folder
        return (folder / "model.safetensors").read_bytes() == b"weights " * 1000
    tried(name, load)
left = Path({home!r}).rglob("snapshots/*/model.safetensors")
print("left", *sorted(path.parents[2].name.removeprefix("models--user--") for path in left))
print("outside", [str(path) for path in Path(".").rglob("evil*")])
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    for name, content in FOLDER.items():
        (tmp_path / "run" / name).write_bytes(content)


def outcomes(output: str) -> dict[str, str]:
    """What became of each name; nothing that was printed or logged holds the token."""
    assert WRITE_TOKEN not in output
    lines = [line for line in output.splitlines() if not line.startswith(("WARNING:", "INFO:"))]
    return dict(line.split(" ", 1) for line in lines)


def test_push(hub, run_client, run):
    def commits(name):
        return rf"/api/models/user/{name}/commit/"

    def other_writer(name):
        """Somebody pushes another model in between."""
        repository, number = hub.repositories[f"user/{name}"], next(counter)
        theirs = {name: Blob(b"theirs %d" % number) for name in ("config.json", "model.safetensors", "theirs.txt")}
        repository.commit("main", {**repository.commits[repository.refs["main"]], **theirs})

    counter = itertools.count()
    hub.faults = [
        Fault("POST", commits("trouble"), status=500),
        Fault("POST", commits("reset"), reset=True),
        Fault("POST", commits("answer-lost"), reset=True, after=True),
        Fault("POST", "/user/slow-down/preupload", status=429, headers={"Retry-After": "1"}),
        Fault("POST", commits("busy"), status=409),
        Fault("POST", commits("second-writer"), first=lambda: other_writer("second-writer")),
        Fault("POST", commits("down"), times=99, status=503),
        Fault("POST", commits("unknown"), times=99, status=401),
        Fault("POST", commits("read-only"), times=99, status=403),
        Fault("POST", commits("gone"), times=99, status=404),
        Fault("POST", commits("crowded"), times=99, first=lambda: other_writer("crowded")),
    ]
    names = ["trouble", "reset", "answer-lost", "slow-down", "busy", "second-writer"]
    failing = ["down", "unknown", "read-only", "gone", "crowded"]
    result = outcomes(run_client(CLIENT + PUSH.format(names=names + failing)))
    for name in names:
        assert result[name].startswith("done: "), result[name]
        files = hub.files(f"user/{name}")
        assert {path: files[path] for path in FOLDER} == FOLDER
    assert len(hub.repositories["user/answer-lost"].commits) == 2, "made, and pushed to once"
    assert hub.files("user/second-writer")["theirs.txt"] == b"theirs 0"
    for name, message in {
        "down": "the Hub has trouble of its own (503) with 'user/down'",
        "unknown": "the Hub does not accept the token for 'user/unknown'",
        "read-only": "the token may not write to 'user/read-only'",
        "gone": "no model 'user/gone'",
        "crowded": "somebody else keeps committing to 'user/crowded'",
    }.items():
        assert result[name].startswith(f"failed: {message}"), result[name]
        expected = set() if name != "crowded" else {"config.json", "model.safetensors", "theirs.txt"}
        assert set(hub.files(f"user/{name}")) == expected, "nothing half-written"
    assert "nothing was published" in result["down"] and "nothing was published" in result["crowded"]
    for name in ("unknown", "read-only", "gone"):
        assert sum(f"user/{name}/commit" in path for _, path in hub.requests) == 1, "a refusal is not asked again"
    assert result["unharmed"] == "True"


def test_upload_that_breaks_off(hub, run_client, run):
    hub.upload_mode = "lfs"
    hub.faults = [Fault("PUT", "/lfs/", times=2, reset=True), Fault("POST", "/lfs-verify", status=500)]
    result = outcomes(run_client(CLIENT + PUSH.format(names=["model"])))
    assert result["model"].startswith("done: ")
    assert hub.files("user/model")["model.safetensors"] == FOLDER["model.safetensors"]


def test_load(hub, run_client, tmp_path):
    def weights(name):
        return rf"/user/{name}/resolve/.*/model.safetensors"

    names = ["cut", "trouble", "reset", "slow-down", "always-cut", "down", "unknown", "gone", "evil"]
    for name in names:
        hub.add_repository(f"user/{name}", FOLDER)
    evil = {**FOLDER, "../../../evil.json": b"{}", "/tmp/evil.json": b"{}", "a/../../evil.txt": b"{}"}
    hub.add_repository("user/evil", evil)
    hub.faults = [
        Fault("GET", weights("cut"), truncate=True),
        Fault("GET", weights("trouble"), status=500),
        Fault("GET", weights("reset"), reset=True),
        Fault("GET", "/api/models/user/slow-down", status=429),
        Fault("GET", weights("always-cut"), times=99, truncate=True),
        Fault("HEAD", weights("down"), times=99, status=503),
        Fault("GET", "/api/models/user/unknown", times=99, status=401),
        Fault("GET", "/api/models/user/gone", times=99, status=404),
    ]
    result = outcomes(run_client(CLIENT + LOAD.format(names=names, home=str(tmp_path / "home"))))
    for name in names[:4]:
        assert result[name] == "done: True", result[name]
    for name in names[4:8]:
        assert result[name].startswith("failed: ") and f"'user/{name}'" in result[name], result[name]
    assert result["left"].split() == ["cut", "reset", "slow-down", "trouble"], "a file that was cut is in no snapshot"
    assert result["outside"] == "[]"


def test_texts_with_a_token_are_not_published(tmp_path):
    token = "hf_" + "a" * 34
    for name, content in {"README.md": "# A card", "sparse_ft.json": json.dumps({"note": token})}.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match="sparse_ft.json holds a Hub token, so nothing was published") as caught:
        check_secrets(files_to_publish(tmp_path), "unrelated")
    assert token not in str(caught.value)
    (tmp_path / "sparse_ft.json").write_text('{"note": "my-own-kind"}')
    with pytest.raises(ModelError, match="holds a Hub token"):
        check_secrets(files_to_publish(tmp_path), "my-own-kind")
    check_secrets(files_to_publish(tmp_path), "another")


def test_links_that_lead_out_are_not_published(tmp_path):
    (tmp_path / "secret.txt").write_text("private")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ModelError, match="is a link to .*secret.txt, outside the folder"):
        files_to_publish(folder)


def test_snapshot_of_the_cache_can_be_published(tmp_path):
    """Its files are links into the cache's blobs."""
    blob, snapshot = tmp_path / "blobs" / "abc", tmp_path / "snapshots" / "123"
    blob.parent.mkdir()
    snapshot.mkdir(parents=True)
    blob.write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert list(files_to_publish(snapshot)) == ["config.json"]
