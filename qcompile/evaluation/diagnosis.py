"""diagnose(): which layers lose the accuracy, why, and where quality breaks.

Quality is broken at a layer when its accumulated SQNR is below a threshold (10 dB: the noise has a tenth of the
signal's power). Errors can be averaged away again, by a residual sum or a pooling behind them, so what counts is a
chain of broken layers that reaches an output of the network: the **first** layer, in the order of execution, from
which such a chain starts is where quality breaks. No chain, no break.

The first layer is not always the one at fault: it may only hand on, or amplify, what was lost before it. So its own
share of the noise is given (the isolated noise over the accumulated one), and the largest part of its own error:
its inputs' grids (then the range of the layer before is the fault), its output's grid, or its weights.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import fx, nn
from torch.export import ExportedProgram

from qcompile.compiled import CompiledModel
from qcompile.errors import ConfigError, InputError
from qcompile.evaluation import files
from qcompile.evaluation.feed import Piece, pieces, runnable
from qcompile.evaluation.layers import BINS, Comparison, reads, real_name, saturation, weight_codes
from qcompile.evaluation.original import original
from qcompile.ir import Program, where
from qcompile.passes.base import Progress
from qcompile.quantizer import QuantizedModel
from qcompile.runtime import Model
from qcompile.sites import HOLDS, Held
from qcompile.specs import input_specs

THRESHOLD = 10.0
CAUSES = {
    "inputs": "the int8 grid of what it reads",
    "output": "the int8 grid of its output",
    "operator": "its weights, or its arithmetic",
}


@dataclass(frozen=True)
class LayerRow:
    """One layer: an integer operator with what it absorbs, a quantization, or an operator that stayed float.

    Attributes:
        node: its name in the graph.
        value: the node of the float graph whose value it computes, or the model's input.
        op: the operator.
        where: the module path in the user's model.
        kind: as in the ledger: "integer", "float", "bfloat16" or "weight-only".
        position: in the order of execution, from 0.
        reads: the nodes of the layers whose values it reads.
        accumulated: SQNR of its output in dB, both networks run from the model's input.
        isolated: SQNR in dB with exact inputs, as exactly as int8 holds them: what it loses alone. Infinite for a
            float operator.
        inputs, output, operator: the SQNR that would remain if only this part of the isolated error were there: of
            its inputs' grids, its output's grid, its weights and arithmetic.
        own: the isolated noise as a part of the accumulated noise, 0 to 1.
        scale, zero_point: of its output; None for a float operator.
        below, above: the part of its float output that int8 saturates, at either end.
        values: histogram of its float output over its grid: the count below it, of `BINS` equal parts, above it.
        weights: histogram of its int8 weights from -128 to 127 in `BINS` equal parts; empty where it has none.
    """

    node: str
    value: str
    op: str
    where: str
    kind: str
    position: int
    reads: tuple[str, ...]
    accumulated: float
    isolated: float
    inputs: float
    output: float
    operator: float
    own: float
    scale: float | None
    zero_point: int | None
    below: float
    above: float
    values: tuple[int, ...]
    weights: tuple[int, ...]

    @property
    def name(self) -> str:
        """For people: the module path, or the value where there is none; a quantization says so."""
        name = self.where or self.value
        return f"{name} to int8" if self.op == "quantize" else name

    @property
    def cause(self) -> str | None:
        """The largest part of its own error: "inputs", "output" or "operator"; None when it makes none."""
        if self.isolated == math.inf:
            return None
        return min(CAUSES, key=lambda part: float(getattr(self, part)))


@dataclass(frozen=True)
class Diagnosis:
    """The layers of a network, the worst first: by what each loses alone. Prints as a table.

    Attributes:
        rows: every layer.
        samples: how many were compared.
        threshold: dB below which quality is broken.
        first_node: the node of the first layer where quality breaks; None when it does not.
    """

    rows: tuple[LayerRow, ...]
    samples: int
    threshold: float
    first_node: str | None

    @cached_property
    def in_order(self) -> tuple[LayerRow, ...]:
        """The layers in the order of execution."""
        return tuple(sorted(self.rows, key=lambda row: row.position))

    def row(self, node: str) -> LayerRow:
        """The layer with this node.

        Raises:
            KeyError: there is none.
        """
        return {row.node: row for row in self.rows}[node]

    @property
    def first(self) -> LayerRow | None:
        """The first layer where quality breaks; None when it does not."""
        return None if self.first_node is None else self.row(self.first_node)

    @property
    def summary(self) -> str:
        """Where quality breaks, and whose fault it is, in words."""
        first, worst = self.first, self.rows[0]
        if first is None:
            lowest = min(self.rows, key=lambda row: row.accumulated)
            return (
                f"Quality breaks nowhere: no layer below {self.threshold:g} dB reaches an output. "
                f"The lowest is {lowest.name} with {lowest.accumulated:.1f} dB; "
                f"{worst.name} loses most alone ({worst.isolated:.1f} dB)."
            )
        before = [self.row(node) for node in first.reads]
        came = min((row.accumulated for row in before), default=math.inf)
        text = f"Quality breaks at {first.name} ({first.node}, {first.op}): {first.accumulated:.1f} dB"
        text += f" of inputs with {came:.1f} dB. " if came < math.inf else ". "
        if first.own < 0.5 or first.cause is None:
            return text + (
                f"Only {first.own:.0%} of that noise is its own; the rest was lost before it. "
                f"{worst.name} loses most alone ({worst.isolated:.1f} dB)."
            )
        text += f"{first.own:.0%} of that noise is its own ({first.isolated:.1f} dB alone), most by "
        read = f": {', '.join(row.name for row in before)}" if first.cause == "inputs" and before else ""
        return f"{text}{CAUSES[first.cause]}{read}."

    def table(self, most: int | None = None) -> Table:
        """The `most` worst layers (default: all)."""
        columns = ("layer", "op", "accumulated", "isolated", "inputs", "output", "operator", "own", "saturated")
        table = Table(title=self.summary, title_justify="left", title_style="")
        for position, column in enumerate(columns):
            table.add_column(column, justify="right" if position > 1 else "left", overflow="fold")
        for row in self.rows[:most]:
            parts = (row.accumulated, row.isolated, row.inputs, row.output, row.operator)
            numbers = [*(f"{value:.1f}" for value in parts), f"{row.own:.0%}", f"{row.below + row.above:.2%}"]
            table.add_row(escape(row.name), row.op, *numbers, style="red" if row.node == self.first_node else None)
        return table

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=140).print(self.table())
        return out.getvalue()

    def to_json(self) -> str:
        """Every number, as a JSON object; infinities as "inf" and "-inf"."""
        return files.to_json(self, first=self.first_node, summary=self.summary)

    def html(self, path: str | Path) -> None:
        """Write one HTML page that needs nothing else."""
        from qcompile.evaluation.page import page

        files.write(path, page(diagnosis=self))

    def save(self, path: str | Path) -> None:
        """Write a .json or .html file, by its suffix. Raises ConfigError for any other."""
        files.save(self, path)


def diagnose(
    compiled: CompiledModel | QuantizedModel,
    model: nn.Module | ExportedProgram,
    data: Iterable[Any],
    *,
    threshold: float = THRESHOLD,
    progress: Progress | None = None,
) -> Diagnosis:
    """Compare every layer of a quantized network with the float network it was made of.

    Args:
        compiled: from `qcompile.compile` or `qcompile.quantize`; with a pipeline of one's own, too.
        model: the float model that was compiled, unchanged.
        data: typical inputs, as for calibration; some ten samples do. Everything in it is read, once.
        threshold: the SQNR in dB below which quality is broken.
        progress: called after each batch.

    Raises:
        InputError: `compiled` was loaded from a file, which holds machine code and no layers; there is no data or
            it does not fit; or `model` is not the model that was compiled. ConfigError: threshold is no number.
    """
    if not isinstance(compiled, (CompiledModel, QuantizedModel)):
        loaded = isinstance(compiled, Model)
        raise InputError(
            "the layers of a model from a file are not known: it holds machine code"
            if loaded
            else f"the quantized network is a {type(compiled).__name__}",
            where="compiled",
            remedy="diagnose what qcompile.compile or qcompile.quantize returned: diagnose(compiled, model, data)",
        )
    if not isinstance(threshold, (int, float)) or math.isnan(threshold):
        raise ConfigError(f"threshold is {threshold!r}", where="threshold", remedy="give a number of dB, such as 20")
    program = compiled.program
    feed = pieces(data, input_specs(program), runnable(model), labels=False, progress=progress, step="diagnose")
    comparison: Comparison | None = None
    samples = 0
    for piece in feed:
        comparison = comparison or start(compiled, model, piece)
        comparison.add(list(piece.flat))
        samples += piece.samples
    assert comparison is not None  # a feed without data raises
    return finish(program, comparison, samples, threshold)


def start(compiled: CompiledModel | QuantizedModel, model: nn.Module | ExportedProgram, example: Piece) -> Comparison:
    """A comparison with the float graph of `model`, captured with the inputs of `example`."""
    inputs = example.named or example.positional
    return Comparison(compiled.program, original(compiled.program, compiled.recipe, model, inputs))


def finish(program: Program, comparison: Comparison, samples: int, threshold: float = THRESHOLD) -> Diagnosis:
    """What a comparison of `samples` samples found."""
    nodes = list(comparison.sums)
    rows = [_row(program, comparison, node, position) for position, node in enumerate(nodes)]
    if not rows:
        raise InputError("the network has no layers", remedy="diagnose a network that computes something")
    accumulated = {node: row.accumulated for node, row in zip(nodes, rows, strict=True)}
    first = first_broken(program, accumulated, threshold)
    ordered = sorted(rows, key=lambda row: (row.isolated, row.accumulated))
    return Diagnosis(tuple(ordered), samples, threshold, first.name if first is not None else None)


def first_broken(program: Program, accumulated: dict[fx.Node, float], threshold: float) -> fx.Node | None:
    """The first layer of a chain of layers below `threshold` that ends at an output."""
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    layers = set(accumulated)
    reached = set(reads(output, layers))
    first = None
    for node in reversed(accumulated):
        if node in reached and accumulated[node] < threshold:
            first = node
            reached.update(reads(node, layers))
    return first


def _row(program: Program, comparison: Comparison, node: fx.Node, position: int) -> LayerRow:
    sums = comparison.sums[node]
    powers = sums.powers
    held: Held | None = node.meta.get(HOLDS)
    values = tuple(sums.histogram.tolist()) if held is not None else ()
    below, above = saturation(values) if held is not None else (0.0, 0.0)
    codes = weight_codes(program, node)
    counts = (
        torch.bincount((codes.long().flatten() + 128) * BINS // 256, minlength=BINS).tolist()
        if codes is not None
        else []
    )
    noise = powers["accumulated"].noise
    kinds = {row.node: row.kind for row in program.ledger.rows}
    inputs = {placeholder.name: str(placeholder.target) for placeholder in program.placeholders()}
    return LayerRow(
        node=node.name,
        value=inputs.get(real_name(node), real_name(node)),
        op=str(node.target).split(".")[1] if "." in str(node.target) else str(node.target),
        where=where(node),
        kind="integer" if held is not None else kinds.get(real_name(node), "float"),
        position=position,
        reads=tuple(used.name for used in reads(node, set(comparison.sums))),
        accumulated=powers["accumulated"].sqnr,
        isolated=powers["isolated"].sqnr,
        inputs=powers["inputs"].sqnr,
        output=powers["output"].sqnr,
        operator=powers["operator"].sqnr,
        own=min(1.0, powers["isolated"].noise / noise) if noise else 0.0,
        scale=None if held is None else held.qparams.scale,
        zero_point=None if held is None else held.qparams.zero_point,
        below=below,
        above=above,
        values=values,
        weights=tuple(counts),
    )
