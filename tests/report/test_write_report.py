import base64
import hashlib
import html.parser
import re
import xml.etree.ElementTree as ElementTree

import pytest
from torch import nn

from sparse_ft.conversion import ConversionReport, LayerConversion
from sparse_ft.masks import SparsityReport, prune
from sparse_ft.report import write_report

HOSTILE = '<img src=x onerror="alert(1)">&$\\frac{'
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced and collects text by element and every address in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
                self.addresses.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


@pytest.fixture
def sparsity() -> SparsityReport:
    model = nn.ModuleDict(
        {"stem": nn.Conv2d(3, 8, 3), HOSTILE.replace(".", ""): nn.Conv2d(8, 8, 3), "head": nn.Linear(8, 2)}
    )
    return prune(model, 0.75)


@pytest.fixture
def conversion(sparsity) -> ConversionReport:
    _, pruned, head = sparsity.layers
    return ConversionReport(
        "auto",
        [
            LayerConversion(pruned.name, pruned.kind, pruned.shape, pruned.nnz, 0.75, True, "", 2.5, 1.25),
            LayerConversion(head.name, head.kind, head.shape, head.nnz, 0.0, False, f"dense {HOSTILE}"),
        ],
    )


HISTORY = [
    {"loss": 2.0, "learning_rate": 0.1, "epoch": 0.5, "step": 1},
    {"loss": float("nan"), "epoch": 1.0, "step": 2},
    {"eval_loss": 1.5, "eval_accuracy": 0.6, "eval_runtime": 3.0, "epoch": 1.0, "step": 2},
    {"train_runtime": 9.0, "train_loss": 1.7, "epoch": 1.0, "step": 2},
]


def write(path, sparsity, **options) -> tuple[str, Page]:
    write_report(path, **{"title": "a run", "summary": {}, "sparsity": sparsity} | options)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def full(path, sparsity, conversion) -> tuple[str, Page]:
    return write(
        path,
        sparsity,
        title=f"title {HOSTILE}",
        summary={"model": HOSTILE, HOSTILE: 1, "rate": 0.00012345, "images": 7500, "resumed": True},
        conversion=conversion,
        history=[*HISTORY, {"eval_<b>": 0.5, "epoch": 1.0}],
        comparison={"dense_ms": 200.0, "sparse_ms": 80.0},
        evals={"eval_accuracy": 0.8125, HOSTILE: HOSTILE},
    )


def test_page_has_every_part(tmp_path, sparsity, conversion):
    text, page = full(tmp_path / "report.html", sparsity, conversion)
    assert {"Run", "Evaluation", "Layers"} <= set(page.texts["h2"])
    captions = ["Loss", "Metrics", "Learning rate", "Time by layer, dense and sparse", "Sparsity by layer"]
    assert page.texts["figcaption"] == captions
    assert text.count("<svg") == 5
    for figure in ("81.25 %", "2.50 ×", "53.47 %", "376"):
        assert figure in page.texts["b"]
    assert {"7,500", "0.0001234", "True", "0.8125"} <= set(page.texts["dd"])
    assert {"2.50", "1.25", "8 × 8 × 3 × 3", "75.00 %", "144"} <= set(page.texts["td"])
    assert page.texts["span"].count("sparse") == 1 and page.texts["span"].count("dense") == 2


def test_text_of_strangers_is_escaped(tmp_path, sparsity, conversion):
    text, page = full(tmp_path / "report.html", sparsity, conversion)
    assert "<img" not in text and "<b>" not in re.sub(r'<div class="tile"><b>', "", text)
    assert page.texts["title"] == page.texts["h1"] == [f"title {HOSTILE}"]
    assert HOSTILE in page.texts["td"] and HOSTILE in page.texts["dd"]


def test_nothing_comes_from_elsewhere(tmp_path, sparsity, conversion):
    text, page = full(tmp_path / "report.html", sparsity, conversion)
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text.split("<script>")[0])
    assert page.tags.count("script") == 1 and not {"link", "iframe", "object", "img"} & set(page.tags)


def test_security_policy_allows_this_script_only(tmp_path, sparsity):
    text, _ = write(tmp_path / "report.html", sparsity)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    allowed = re.search(r"script-src 'sha256-([^']+)'", text)[1]
    assert base64.b64decode(allowed) == hashlib.sha256(script.encode()).digest()
    assert "default-src 'none'" in text


def test_figures_are_well_formed_and_scale(tmp_path, sparsity, conversion):
    text, _ = full(tmp_path / "report.html", sparsity, conversion)
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for figure in figures:
        root = ElementTree.fromstring(figure.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
        assert "viewBox" in root.attrib and "width" not in root.attrib
        assert "currentColor" in figure


def test_parts_without_content_are_left_out(tmp_path, sparsity):
    text, page = write(tmp_path / "report.html", sparsity)
    assert page.texts["h2"] == ["Layers"]
    assert page.texts["figcaption"] == ["Sparsity by layer"]
    assert "as fast as dense" not in text and "dense ms" not in text


def test_step_is_the_clock_of_a_history_without_epochs(tmp_path, sparsity):
    text, _ = write(tmp_path / "report.html", sparsity, history=[{"loss": 1.0, "step": 1}, {"loss": 0.5, "step": 2}])
    assert "step</text>" in text


def test_model_without_prunable_layers(tmp_path):
    _, page = write(tmp_path / "report.html", SparsityReport([]))
    assert "svg" not in page.tags


def test_failure_leaves_the_old_report(tmp_path, sparsity):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(KeyError):
        write_report(path, title="", summary={}, sparsity=sparsity, comparison={"dense_ms": 1.0})
    assert path.read_text() == "old"
