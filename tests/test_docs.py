"""The documentation is true: its Python runs, its commands run, its pictures are of today's graphs."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def run_commands(example: Example) -> None:
    """A block of shell commands, each of which must succeed (a leading "$ " is the prompt)."""
    commands = "\n".join(line.removeprefix("$ ") for line in example.parsed.splitlines())
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], env={**os.environ, "PATH": here}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}{done.stderr}"


SYBIL = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser(language="bash", evaluator=run_commands),
        SkipParser(),
    ]
)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_snippet_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippets of a page share their names, as a reader would type them one after the other."""
    monkeypatch.chdir(tmp_path)
    examples = list(SYBIL.parse(page).examples())
    assert len(examples) >= len(re.findall(r"^```(?:python|bash)$", page.read_text(), re.MULTILINE))
    for example in examples:
        with suppress(SkipTest):  # what the page says that it needs is not here
            example.evaluate()


def test_pages_name_only_files_that_exist() -> None:
    """Every `folder/file.py` that a page mentions in code style is there."""
    for page in PAGES:
        for name in re.findall(
            r"`((?:qcompile|passes|targets|tests|examples|benchmarks|docs)/[\w./]+)`", page.read_text()
        ):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_make_knows_the_targets_that_the_readme_names() -> None:
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= named <= known


def test_the_pictures_of_the_stages_are_up_to_date() -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "draw_stages.py"))["pictures"]()
    kept = {path.name: path.read_text() for path in (ROOT / "docs" / "stages").glob("*.svg")}
    assert drawn == kept, "run `make docs` and commit docs/stages"
