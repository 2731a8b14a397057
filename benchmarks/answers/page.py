"""`docs/answers.md`: prose by hand, and between marks what `docs/answers.json` says.

    <!-- measured: NAME -->
    ...
    <!-- end -->

NAME is that of a section, for its answer in words, or `figures: NAME` for a table, or `machine`.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill

from benchmarks import table
from benchmarks.answers import complexity, fusion, learning, precision, robustness, speed, storage
from benchmarks.answers.figures import Figures
from benchmarks.results import rounded

SECTIONS = {
    "precision": precision,
    "speed": speed,
    "storage": storage,
    "complexity": complexity,
    "robustness": robustness,
    "learning": learning,
    "fusion": fusion,
}
PENDING = "Not measured yet.\n"
_MARKED = re.compile(r"(<!-- measured: (?P<name>[\w: ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Answers:
    """What was measured: the figures of each section, where, and with what."""

    machine: dict[str, str]
    versions: dict[str, str]
    figures: dict[str, dict[str, Figures]]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(rounded(asdict(self)), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Answers:
        raw = json.loads(path.read_text())
        figures = {name: {key: Figures(**f) for key, f in found.items()} for name, found in raw["figures"].items()}
        return Answers(raw["machine"], raw["versions"], figures)

    def blocks(self) -> dict[str, str]:
        """What stands on the page, by the name of its mark."""
        versions = ", ".join(f"{name} {number}" for name, number in sorted(self.versions.items()))
        found = {"machine": table.markdown(("", ""), list(self.machine.items())) + f"\nVersions: {versions}.\n"}
        for name, figures in self.figures.items():
            sentences = SECTIONS[name].answer(figures)
            found[name] = fill(sentences, 116, break_long_words=False, break_on_hyphens=False) + "\n"
            found |= {f"figures: {key}": f.markdown() for key, f in figures.items()}
        return found


def written(page: str, answers: Answers) -> str:
    """`page` with what `answers` say between its marks; of a section that was never measured, that it was not.

    Raises:
        ValueError: an answer has no mark, or a mark no answer though all sections were measured.
    """
    blocks = answers.blocks()
    marks = {match["name"] for match in _MARKED.finditer(page)}
    wrong = set(blocks) - marks
    if set(answers.figures) == set(SECTIONS):
        wrong |= marks - set(blocks)
    if wrong:
        raise ValueError(f"what is marked on the page and what was measured differ: {', '.join(sorted(wrong))}")
    return _MARKED.sub(lambda match: f"{match[1]}\n{blocks.get(match['name'], PENDING)}\n{match[3]}", page)
