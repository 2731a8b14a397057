"""The HTML page: whole by itself, escaped, and with everything in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from passing import images, network, randn
from torch import nn

import qcompile
from qcompile.evaluation.page import bars, decibels, percent

VOID = {"meta"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    model, path = network(), tmp_path_factory.mktemp("page") / "report.html"
    compiled = qcompile.compile(model, calibration=images(16))
    with torch.no_grad():
        data = [(x, (model(x).argmax(1) + i % 2) % 5) for i, x in enumerate(images(6))]
    found = qcompile.evaluate(compiled, model, data, labels=True, robustness=True, layers=4, blocks=1)
    found.save(path)
    return path.read_text()


def test_it_needs_nothing_else(page: str) -> None:
    reader = Reader(page)
    assert not {tag for tag, _ in reader.seen} & {"script", "link", "img", "iframe", "object"}
    assert not any(name in ("src", "href", "xlink:href") for _, attributes in reader.seen for name in attributes)
    assert not re.search(r"https?:|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page


def test_everything_is_in_it(page: str) -> None:
    text = Reader(page).text
    for part in (
        "same answer", "accuracy", "F1", "less contrast", "faster", "smaller", "Quality breaks nowhere",
        "3.first.0", "adaptive_avg_pool2d", "Most frequent mistakes", "ledger", "aten.conv2d",
    ):  # fmt: skip
        assert part in text, part
    assert page.count('class="inside"') == 9  # five with weights, two pools, hardswish, and the input
    assert page.count('class="weights"') == 5


def test_the_worst_layer_comes_first_and_the_broken_one_is_marked(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    data = [randn(16, 8, seed=i) for i in range(4)]
    config = qcompile.QuantConfig(overrides={"1": {"observer": "percentile", "percentile": 51.0}})
    found = qcompile.diagnose(qcompile.quantize(model, calibration=data, config=config), model, data)
    found.html(tmp_path / "layers.html")
    page = (tmp_path / "layers.html").read_text()
    Reader(page)
    assert found.first is not None
    assert "verdict broken" in page
    assert page.count('<tr class="broken">') == 1
    assert page.index('<tr class="broken">') < page.index("to int8<div")
    assert 'class="beyond" d="M' in page


def test_names_from_the_model_are_escaped(tmp_path: Path) -> None:
    """A module may be named anything, markup included."""
    model = nn.Sequential()
    model.add_module("<script>alert(1)</script>&[red]x[/]", nn.Linear(8, 4))
    data = [randn(16, 8, seed=i) for i in range(4)]
    compiled = qcompile.compile(model.eval(), calibration=data)
    found = qcompile.evaluate(compiled, model, data, layers=16, blocks=0)
    page = tmp_path / "report.html"
    found.save(page)
    assert "<script>" not in page.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;[red]x[/]" in page.read_text()
    assert "[red]x" in str(found)


def test_numbers_for_people() -> None:
    assert [decibels(x) for x in (None, 12.345, float("inf"), -float("inf"))] == ["", "12.3 dB", "exact", "lost"]
    assert [percent(x) for x in (0.0, 1e-6, 0.002, 0.0567, 0.4)] == ["", "< 0.01%", "0.20%", "5.7%", "40%"]
    assert bars([0, 4, 1, 0], 4) == "M1 24V0.0h1V24M2 24V12.0h1V24"
    assert bars([0, 0], 0) == ""
