"""The pages in a real browser, at the width of a desk and of a phone.

`make test-slow` installs the driver; the machine has Chromium and a font (Debian: chromium, fonts-dejavu-core).
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_gallery import make_run
from test_write_report import full
from torch import nn

from sparse_ft.conversion import ConversionReport, LayerConversion
from sparse_ft.masks import prune
from sparse_ft.report import find_runs, write_gallery

pytestmark = pytest.mark.slow
PHONE, DESK = 390, 1280
NAMES = "[...document.querySelectorAll('tbody tr')].map(row => row.cells[0].textContent.trim())"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    playwright = pytest.importorskip("playwright.sync_api", reason="see the extra test-slow")
    places = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    if (chromium := next(filter(None, places), None)) is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


def gallery(folder: Path) -> Path:
    make_run(folder / "r80", sparsity=0.8, metrics={"accuracy": 0.91}, speed={"dense_ms": 30.0, "sparse_ms": 10.0})
    make_run(folder / "r95", sparsity=0.95, metrics={"accuracy": 0.87}, speed={"dense_ms": 30.0, "sparse_ms": 8.0})
    make_run(folder / "a run with a long name", sparsity=0.99, metrics={"loss": 2.0}, compact=2_500_000)
    write_gallery(folder / "gallery.html", find_runs([folder]))
    return folder / "gallery.html"


def report(folder: Path) -> Path:
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "body": nn.Conv2d(8, 8, 3), "head": nn.Linear(8, 2)})
    sparsity = prune(model, 0.75)
    _, pruned, head = sparsity.layers
    layers = [
        LayerConversion(pruned.name, pruned.kind, pruned.shape, pruned.nnz, 0.75, True, "", 2.5, 1.25),
        LayerConversion(head.name, head.kind, head.shape, head.nnz, 0.0, False, "measured slower than dense"),
    ]
    full(folder / "report.html", sparsity, ConversionReport("auto", layers))
    return folder / "report.html"


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize(("write", "plots"), [(gallery, 2), (report, 4)])
def test_page_in_a_browser(browser, tmp_path, write, plots, width):
    """Nothing to report on the console, no sideways scrolling, plots drawn within the page, a column sorts."""
    path = write(tmp_path)
    page = browser.new_page(viewport={"width": width, "height": 844})
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    sizes = page.evaluate("[...document.querySelectorAll('svg')].map(plot => plot.getBoundingClientRect().width)")
    assert len(sizes) == plots and all(250 < size <= width for size in sizes)
    assert page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 14
    page.click("th:nth-child(1) button")
    rising = page.evaluate(NAMES)
    page.click("th:nth-child(1) button")
    assert page.evaluate(NAMES) == rising[::-1] and rising == sorted(rising) and len(rising) > 1
    assert messages == []
    page.screenshot(path=tmp_path / f"{width}.png", full_page=True)
    page.close()
