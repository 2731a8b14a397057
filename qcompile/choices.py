"""What a search for accuracy chose, and what it reached."""

from __future__ import annotations

import io
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Choice:
    """A layer that is left in float.

    Attributes:
        layer: its module path.
        operators: the names of the operators that one integer operator would have computed.
        numerics: what it computes in.
        gain: of the metric: how much lower it is, simulated, with this layer quantized and the others as they are.
        noise: the part that its roundings have in the squared error of the outputs, of all layers' together.
        cost_ms: how much slower a call it makes: the difference of its kernels, measured in the float network and in
            the int8 network; for another machine, an estimate.
    """

    layer: str
    operators: tuple[str, ...]
    numerics: str
    gain: float
    noise: float
    cost_ms: float


@dataclass(frozen=True)
class Choices:
    """The layers that a search left in float, the largest gain first, and what it reached. Prints as a table.

    Attributes:
        rows: the choices.
        max_drop: how much lower than the float model's the metric may be.
        float_metric, int8_metric, metric: of the float model, of the model with every layer int8, and of this one.
        int8_ms, ms: latency of a call of the int8 model and of this one, in milliseconds; None for another machine.
    """

    rows: tuple[Choice, ...]
    max_drop: float
    float_metric: float
    int8_metric: float
    metric: float
    int8_ms: float | None
    ms: float | None

    @property
    def drop(self) -> float:
        """float_metric - metric."""
        return self.float_metric - self.metric

    @property
    def met(self) -> bool:
        """Whether the metric has dropped by no more than `max_drop`."""
        return self.drop <= self.max_drop

    @property
    def operators(self) -> frozenset[str]:
        """The names of all operators that are left in float."""
        return frozenset(name for row in self.rows for name in row.operators)

    def table(self) -> Table:
        """The rows, with what was reached as title."""
        reached = f"metric {self.metric:.4g} (float {self.float_metric:.4g}, int8 {self.int8_metric:.4g})"
        time = "" if self.ms is None else f", {self.ms:.3f} ms (int8 {self.int8_ms:.3f} ms)"
        missed = "" if self.met else f"; a drop of {self.max_drop:g} was not reached"
        table = Table("layer", "numerics", "gain", "of noise", "cost ms", title=f"{reached}{time}{missed}")
        for row in self.rows:
            numbers = f"{row.gain:.4g}", f"{row.noise:.1%}", f"{row.cost_ms:.4f}"
            table.add_row(row.layer or row.operators[0], row.numerics, *numbers)
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=120).print(self.table())
        return out.getvalue()
