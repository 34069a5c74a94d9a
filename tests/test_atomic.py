import pytest

from sparse_ft.atomic import replacing


def test_replaces_in_one_step(tmp_path):
    path = tmp_path / "file.svg"
    path.write_text("old")
    with replacing(path) as temporary:
        assert temporary.suffix == ".svg"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*missing"), replacing(tmp_path / "missing" / "f"):
        pass
