"""Finished runs side by side on one page."""

import json

import pytest
from test_write_report import HOSTILE, Page

from sparse_ft.cli import main
from sparse_ft.report import find_runs, write_gallery


def make_run(folder, *, sparsity=0.9, metrics=None, speed=None, compact=0, page=False):
    folder.mkdir(parents=True)
    info = {"model": f"resnet18 {HOSTILE}", "metrics": metrics or {}, "sparsity": {"sparsity": sparsity}}
    (folder / "sparse_ft.json").write_text(json.dumps(info | ({"speed": speed} if speed else {})))
    if compact:
        (folder / "sparse").mkdir()
        (folder / "sparse" / "model.safetensors").write_bytes(bytes(compact))
    if page:
        (folder / "report.html").write_text("<p>a run")
    return folder


@pytest.fixture
def runs(tmp_path):
    speed = {"dense_ms": 30.0, "sparse_ms": 10.0}
    make_run(tmp_path / "out" / "r80", sparsity=0.8, metrics={"accuracy": 0.91, "loss": 0.4}, speed=speed, page=True)
    make_run(
        tmp_path / "out" / "more" / "r95", sparsity=0.95, metrics={"accuracy": 0.87, "loss": 0.5}, compact=2_500_000
    )
    make_run(tmp_path / "out" / "r99 <b>", sparsity=0.99, metrics={"loss": 2.0}, speed={"sparse_ms": "fast"})
    for name in ("r80/checkpoint-5", "_saving", ".trash"):  # not finished runs
        make_run(tmp_path / "out" / name)
    return tmp_path / "out"


def test_runs_are_found_up_to_two_levels_deep(runs):
    found = {run.name: run for run in find_runs([runs, runs / "r80"])}
    assert set(found) == {"r80", "more/r95", "r99 <b>"}
    assert found["r80"].speedup == 3.0 and found["r80"].metrics == {"accuracy": 0.91, "loss": 0.4}
    assert found["more/r95"].compact_bytes == 2_500_000 and found["more/r95"].speedup is None
    assert found["r99 <b>"].sparse_ms is None


def test_page(runs, tmp_path):
    path = tmp_path / "pages" / "gallery.html"
    path.parent.mkdir()
    write_gallery(path, find_runs([runs]), title=f"models {HOSTILE}")
    text = path.read_text()
    page = Page(text)
    assert page.texts["title"] == [f"models {HOSTILE}"] and "<img" not in text
    assert page.texts["figcaption"] == ["accuracy over sparsity", "accuracy over step time"]
    assert {"80.00 %", "0.91", "10.0", "3.00", "2.50"} <= set(page.texts["td"])
    assert "1 without accuracy; 1 without a measured step." in "".join(page.texts["p"])
    assert [address for address in page.addresses if not address.startswith("#")] == ["./../out/r80/report.html"]
    assert "script-src 'sha256-" in text and page.tags.count("script") == 1


def test_metric_is_chosen(runs, tmp_path):
    write_gallery(tmp_path / "a.html", find_runs([runs]), metric="loss")
    assert "loss over sparsity" in (tmp_path / "a.html").read_text()
    with pytest.raises(ValueError, match="no run has the metric 'f1'; they have accuracy, loss"):
        write_gallery(tmp_path / "a.html", find_runs([runs]), metric="f1")


def test_runs_without_metrics_make_a_table_alone(tmp_path):
    make_run(tmp_path / "run")
    write_gallery(tmp_path / "a.html", find_runs([tmp_path / "run"]))
    page = Page((tmp_path / "a.html").read_text())
    assert "svg" not in page.tags and "90.00 %" in page.texts["td"]


def test_command(runs, tmp_path, capsys):
    assert main(["report", str(runs), "--output", str(tmp_path / "g.html"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["runs"]) == 3 and (tmp_path / "g.html").is_file()
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "nothing is not a folder" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 1
    assert "has no finished run: no sparse_ft.json in it" in capsys.readouterr().err
    (runs / "r80" / "sparse_ft.json").write_text("{}")
    assert main(["report", str(runs)]) == 1
    assert "r80/sparse_ft.json does not describe a run" in capsys.readouterr().err
