"""Move the unevenness of an activation's channels into the weights that read it, where each row has its own scale.

    w x  =  (w s) (x / s)        s_j = max |x_j|^alpha / max |w[:, j]|^(1 - alpha)

x_j is channel j of what the layers read, over the calibration samples; the maximum of w is over all of these layers.
What makes the channels (a norm, a convolution or a linear layer) has its weights and bias divided by s, so nothing is
computed that was not before. alpha = 1 makes all channels of x alike, alpha = 0 all columns of w. Which layers can hand
factors to which, see `qcompile.channels`. A channel that is zero on one side counts as the weakest that is not.

Maxima are measured on the first samples of the calibration data, which the calibration reads again: memory holds these
and no more, and the data may be a generator.

Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (2023),
section 4, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.batches import Batches, empty
from qcompile.channels import MAKERS, Link, columns, links_behind, move, weight_of
from qcompile.distributed import processes
from qcompile.errors import CalibrationError
from qcompile.inputs import count_samples
from qcompile.ir import Program, Property
from qcompile.passes.base import Context, Pass, check_number
from qcompile.passes.calibrate import check_batch

_LITTLE = 1e-3  # a logarithm of a factor that is not worth a change


@dataclass(frozen=True)
class Smooth(Pass):
    """Float -> float, with the same values.

    Attributes:
        alpha: how much of the unevenness goes to the weights, 0 to 1.
        samples: how many samples of the calibration data are measured, in all processes together.

    Raises:
        ConfigError: alpha or samples is out of its range.
        CalibrationError: there is no calibration data, or it is wrong (see `qcompile.passes.calibrate`).
    """

    name: ClassVar[str] = "smooth"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.FLOAT, Property.CANONICAL, Property.BATCHNORM_FOLDED})
    alpha: float = 0.5
    samples: int = 64

    def __post_init__(self) -> None:
        check_number("Smooth", "alpha", self.alpha, float, 0, 1)
        check_number("Smooth", "samples", self.samples, int, 1)

    def run(self, program: Program, context: Context) -> bool:
        links = links_behind(program, MAKERS, self.name)
        if any(each.maker.name not in context.maxima for each in links):
            _measure(program, context, links, self.samples)
        changed = False
        for each in reversed(links):  # the factors of a link change the rows of its maker, which reads an earlier one
            factors = _factors(program, each, context.maxima[each.maker.name], self.alpha)
            if float(factors.log().abs().max()) > _LITTLE and context.spend(self.name, each.maker):
                move(program, each, 1 / factors)
                changed = True
        return changed


def _factors(program: Program, each: Link, activation: Tensor, alpha: float) -> Tensor:
    weight = torch.stack([columns(r, weight_of(program, r)).abs().amax(1) for r in each.readers]).amax(0)
    return _no_zeros(activation) ** alpha / _no_zeros(weight) ** (1 - alpha)


def _no_zeros(strength: Tensor) -> Tensor:
    alive = strength[strength > 0]
    return torch.where(strength > 0, strength, alive.min() if len(alive) else 1.0)


def _measure(program: Program, context: Context, links: list[Link], samples: int) -> None:
    """Put the largest magnitude of each channel that the readers of each link see into `context.maxima`."""
    if context.calibration is None:
        raise CalibrationError(
            "no calibration data", where="pass 'smooth'", remedy="pass calibration=an iterable of typical inputs"
        )
    if not isinstance(context.calibration, Batches):
        context.calibration = Batches(context.calibration)
    together = processes()
    recorder = _Recorder(program, links)
    with together.succeed("smoothing"):
        mine = list(_first(program, context.calibration, samples))
        if not mine:
            raise empty()
    sizes = together.in_turn([(together.rank, sum(map(count_samples, batch))) for batch in mine])
    before = list(accumulate((size for _, size in sizes), initial=0))  # samples in front of each batch
    counted = sum(rank == together.rank and taken < samples for (rank, _), taken in zip(sizes, before, strict=False))
    with together.succeed("smoothing"):
        for done, batch in enumerate(mine[:counted], 1):
            for inputs in batch:
                recorder.run(*inputs)
            context.report("measure channels", done, counted)
    for each in links:
        nothing = torch.zeros(len(weight_of(program, each.maker)), dtype=torch.float64)
        context.maxima[each.maker.name] = together.largest_each(recorder.maxima.get(each.maker.name, nothing))


def _first(program: Program, data: Batches, samples: int) -> Iterator[list[list[Tensor]]]:
    """Batches, each as the pieces that the model takes, until there are `samples` samples."""
    taken = 0
    for index, batch in enumerate(data.ahead()):
        pieces = list(check_batch(program.inputs, batch, f"calibration batch {index}"))
        yield pieces
        taken += sum(map(count_samples, pieces))
        if taken >= samples:
            return


class _Recorder(fx.Interpreter):
    """Runs the float graph and keeps, of each link, the largest magnitude of each channel that its readers see."""

    def __init__(self, program: Program, links: Iterable[Link]) -> None:
        super().__init__(program.graph_module)
        self.maxima: dict[str, Tensor] = {}
        self._makers = {reader: each.maker.name for each in links for reader in each.readers}

    def run_node(self, n: fx.Node) -> Any:
        maker = self._makers.get(n)
        if maker is not None:
            x = self.env[n.args[0]].double().abs()  # type: ignore[index]
            axis = x.dim() - 1 if n.target is torch.ops.aten.linear.default else 1
            largest = x.transpose(0, axis).flatten(1).amax(1)
            self.maxima[maker] = torch.maximum(self.maxima[maker], largest) if maker in self.maxima else largest
        return super().run_node(n)
