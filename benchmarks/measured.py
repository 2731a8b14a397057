"""What was measured, as data, and the pages that say it: prose by hand, and between marks what the data say.

<!-- measured: NAME -->
...
<!-- end -->
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks import table
from benchmarks.figures import Figures
from benchmarks.results import rounded

PENDING = "Not measured yet.\n"
_MARKED = re.compile(r"(<!-- measured: (?P<name>[\w: ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
_Measured = TypeVar("_Measured", bound="Measured")


@dataclass
class Measured:
    """What was measured, where, and with what: the figures of each section."""

    machine: dict[str, str]
    versions: dict[str, str]
    figures: dict[str, dict[str, Figures]]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(rounded(asdict(self)), indent=1) + "\n")

    @classmethod
    def load(cls: type[_Measured], path: Path) -> _Measured:
        raw = json.loads(path.read_text())
        figures = {name: {key: Figures(**f) for key, f in found.items()} for name, found in raw["figures"].items()}
        return cls(raw["machine"], raw["versions"], figures)

    def place(self) -> str:
        """The machine and the versions."""
        return table.place(self.machine, self.versions)


def marks(page: str) -> set[str]:
    """The names of the marks on `page`."""
    return {match["name"] for match in _MARKED.finditer(page)}


def filled(page: str, blocks: Mapping[str, str]) -> str:
    """`page` with `blocks` between its marks; where there is none, that it was not measured."""
    return _MARKED.sub(lambda match: f"{match[1]}\n{blocks.get(match['name'], PENDING)}\n{match[3]}", page)
