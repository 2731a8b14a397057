"""Choose the integer weights of each layer so that it computes, of quantized inputs, what it did in float.

See `qcompile.leastsquares` for the problem that is solved, layer after layer, and how.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir import Program, Property
from qcompile.leastsquares import DECAY, solve
from qcompile.passes.base import Context, Pass, check_number
from qcompile.twins import Layer, layers


@dataclass(frozen=True)
class RoundWeights(Pass):
    """qdq -> qdq, with other weights, scales and biases.

    Attributes:
        decay: how strongly weights are held to the float ones; in units of a tap's mean variance, for as many
            positions as taps.

    Raises:
        ConfigError: decay is negative. CalibrationError: calibration kept no samples.
    """

    name: ClassVar[str] = "round_weights"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.QDQ})
    decay: float = DECAY

    def __post_init__(self) -> None:
        check_number("RoundWeights", "decay", self.decay, float, 0)

    def run(self, program: Program, context: Context) -> bool:

        def visit(layer: Layer) -> None:
            solve(layer, self.decay)

        for done, total in layers(program, context.samples, context.originals, visit):
            context.report("round weights", done, total)
        return bool(context.originals)
