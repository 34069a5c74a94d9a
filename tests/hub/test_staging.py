import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_resnet

from sparse_ft.hub import save_pretrained
from sparse_ft.hub.shards import write_file
from sparse_ft.hub.staging import staged


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_files_replace_their_namesakes_and_others_stay(tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / "same").write_text("old")
    with staged(tmp_path) as stage:
        (stage / "same").write_text("new")
        (stage / "sub").mkdir()
        (stage / "sub" / "file").write_text("new")
        assert (tmp_path / "same").read_text() == "old"
    assert contents(tmp_path) == {"old": b"old", "same": b"new", "sub/file": b"new"}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["sub"]


def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with staged(tmp_path) as stage:
            save_file({"w": torch.zeros(2)}, stage / "model.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o640


def test_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "new" / "folder") as stage:
        (stage / "file").write_text("half")
        raise RuntimeError
    assert not (tmp_path / "new" / "folder").exists()


def test_target_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="it is a file, not a folder"), staged(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_disk_that_fills_up_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, kind):
    """The weights are written to /dev/full, whose every write fails as on a full disk."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    model = tiny_resnet() if kind == "timm" else tiny_bert()
    save_pretrained(model, tmp_path)
    before = contents(tmp_path)

    def write_to_full_disk(path, *args):
        path.symlink_to("/dev/full")
        write_file(path, *args)

    monkeypatch.setattr("sparse_ft.hub.shards.write_file", write_to_full_disk)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(OSError, match="no space left on the disk of .*files that were there are untouched") as caught:
        save_pretrained(model, tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert contents(tmp_path) == before


def test_real_full_disk(tmp_path):
    """A file system of 300 kB: the first save fits, a second beside it does not."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        tensors = {"w": torch.ones(50_000)}
        with staged(tmp_path) as stage:
            save_file(tensors, stage / "model.safetensors")
        with pytest.raises(OSError, match="no space left") as caught, staged(tmp_path) as stage:
            save_file({"w": torch.zeros(50_000)}, stage / "model.safetensors")
        assert caught.value.errno == errno.ENOSPC
        assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
        assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], tensors["w"])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
