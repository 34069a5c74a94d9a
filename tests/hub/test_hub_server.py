"""The local Hub against the real huggingface_hub client: what the end-to-end tests stand on."""

import pytest

UPLOAD_AND_DOWNLOAD = """
import pathlib
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

folder = pathlib.Path("folder")
(folder / "sub").mkdir(parents=True)
weights = bytes(range(256)) * 40
(folder / "model.safetensors").write_bytes(weights)
(folder / "sub" / "config.json").write_text("{}")
(folder / "README.md").write_text("---\\nlicense: mit\\n---\\n# Card\\n")

api = HfApi()
assert api.create_repo("user/model").repo_id == "user/model"
api.create_repo("user/model", exist_ok=True)
first = api.upload_folder(repo_id="user/model", folder_path=folder)
again = api.upload_folder(repo_id="user/model", folder_path=folder)
assert again.oid == first.oid, "an unchanged folder must not make a commit"

(folder / "sub" / "config.json").write_text('{"changed": 1}')
second = api.upload_folder(repo_id="user/model", folder_path=folder)
assert second.oid != first.oid

assert sorted(api.list_repo_files("user/model")) == ["README.md", "model.safetensors", "sub/config.json"]
assert api.model_info("user/model").sha == second.oid
assert api.file_exists("user/model", "README.md") and not api.file_exists("user/model", "absent")

snapshot = pathlib.Path(snapshot_download("user/model"))
assert (snapshot / "model.safetensors").read_bytes() == weights
assert (snapshot / "sub" / "config.json").read_text() == '{"changed": 1}'
old = hf_hub_download("user/model", "sub/config.json", revision=first.oid)
assert pathlib.Path(old).read_text() == "{}"

request = api.upload_folder(repo_id="user/model", folder_path="folder/sub", path_in_repo="pr", create_pr=True)
assert request.pr_num == 1
assert api.file_exists("user/model", "pr/config.json", revision="refs/pr/1")
assert not api.file_exists("user/model", "pr/config.json")
"""


@pytest.mark.parametrize("upload_mode", ["regular", "lfs"])
def test_upload_and_download(hub, run_client, upload_mode):
    hub.upload_mode = upload_mode
    run_client(UPLOAD_AND_DOWNLOAD)
    puts = [path for method, path in hub.requests if method == "PUT"]
    assert len(puts) == (1 if upload_mode == "lfs" else 0)  # the weights, once, although uploaded three times
    assert hub.files("user/model")["sub/config.json"] == b'{"changed": 1}'


def test_access_is_checked(hub, run_client):
    hub.add_repository("user/secret", {"config.json": b"{}"}, private=True)
    code = """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    def status(action):
        try:
            action()
        except HfHubHTTPError as problem:
            return f"{type(problem).__name__}:{problem.response.status_code}"

    print(status(lambda: hf_hub_download("user/secret", "config.json")),
          status(lambda: hf_hub_download("user/secret", "none.json")),
          status(lambda: HfApi().create_repo("user/new")))
    """
    stranger = ["RepositoryNotFoundError:401", "RepositoryNotFoundError:401", "HfHubHTTPError:401"]
    assert run_client(code, token=None).split() == stranger
    reader = ["None", "RemoteEntryNotFoundError:404", "HfHubHTTPError:403"]
    assert run_client(code, token="hf_localreadtoken").split() == reader
