"""Pass: one step of a pipeline; Context: what a run of the pipeline shares with its passes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, fx

from qcompile.config import QuantConfig
from qcompile.errors import ConfigError
from qcompile.ir import Program, Property
from qcompile.ops import Row

Progress = Callable[[str, int, int | None], None]
"""Called with (what is running, steps done, steps in all or None where unknown)."""

Objection = Callable[[Row, fx.Node], str | None]
"""A target's capability: why it cannot take an ATen node as this row, or None when it can."""


@dataclass
class Context:
    """What the passes of one run share.

    Attributes:
        config: how to quantize.
        calibration: batches of inputs, read once by the calibrate pass.
        progress: called after each step of a long pass.
        rewrite_limit: run only the first so many rewrites (to bisect a wrong one); None for all.
        objection: the target's capability, or None for everything in the op table.
        samples: the first inputs that calibration read, for passes that run the model again.
        originals: name of a node of the qdq graph -> the float weight, or bias, that it stands for.
        maxima: name of a node -> the largest magnitude of each channel that it makes, as the layers behind it read
            them. A pass that needs them measures those that are not here, so the same graph can be made again.
        rewrites: every rewrite made, in order: (rule, node).
    """

    config: QuantConfig = field(default_factory=QuantConfig)
    calibration: Iterable[Any] | None = None
    progress: Progress | None = None
    rewrite_limit: int | None = None
    objection: Objection | None = None
    samples: list[list[Tensor]] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    rewrites: list[tuple[str, str]] = field(default_factory=list)

    def spend(self, rule: str, node: fx.Node) -> bool:
        """Account for one rewrite; False when the limit is reached and it must not be made."""
        if self.rewrite_limit is not None and len(self.rewrites) >= self.rewrite_limit:
            return False
        self.rewrites.append((rule, node.name))
        return True

    def report(self, what: str, done: int, total: int | None = None) -> None:
        """Tell the progress callback, if there is one."""
        if self.progress is not None:
            self.progress(what, done, total)


def check_number(owner: str, name: str, value: Any, kind: type, least: float, most: float = math.inf) -> None:
    """Refuse an option `name` of the pass class `owner` that is no `kind` (int or float) from `least` to `most`.

    Raises:
        ConfigError
    """
    number = isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    if not number or not least <= value <= most or math.isinf(value):
        what = "a whole number" if kind is int else "a number"
        up = f" to {most:g}" if most < math.inf else " on"
        raise ConfigError(f"{name} is {value!r}", where=owner, remedy=f"use {what} from {least:g}{up}")


class Pass(ABC):
    """One step. Subclasses are frozen dataclasses; their fields are their options.

    Attributes:
        name: unique within a pipeline.
        requires: what earlier passes must have established.
        establishes: what holds afterwards. A stage (FLOAT, OBSERVED, QDQ, INTEGER) replaces the
            stage before it.
        joins_after: for a pass that joins by entry point: the pass of the default pipeline that it follows.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[Property]] = frozenset()
    establishes: ClassVar[frozenset[Property]] = frozenset()
    joins_after: ClassVar[str | None] = None

    @abstractmethod
    def run(self, program: Program, context: Context) -> bool:
        """Rewrite `program` in place; say whether anything changed.

        The manager cleans up afterwards: it drops dead nodes, recompiles, recomputes shapes and
        verifies the graph.
        """
