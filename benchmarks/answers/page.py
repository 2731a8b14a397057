"""`docs/answers.md`: prose by hand, and between marks what `docs/answers.json` says.

A mark's name is that of a section, for its answer in words, or `figures: NAME` for a table, or `machine`.
"""

from __future__ import annotations

from textwrap import fill

from benchmarks.answers import complexity, fusion, learning, precision, robustness, speed, storage
from benchmarks.measured import Measured, filled, marks

SECTIONS = {
    "precision": precision,
    "speed": speed,
    "storage": storage,
    "complexity": complexity,
    "robustness": robustness,
    "learning": learning,
    "fusion": fusion,
}


class Answers(Measured):
    """The figures of the sections."""

    def blocks(self) -> dict[str, str]:
        """What stands on the page, by the name of its mark."""
        found = {"machine": self.place()}
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
    there = marks(page)
    wrong = set(blocks) - there
    if set(answers.figures) == set(SECTIONS):
        wrong |= there - set(blocks)
    if wrong:
        raise ValueError(f"what is marked on the page and what was measured differ: {', '.join(sorted(wrong))}")
    return filled(page, blocks)
