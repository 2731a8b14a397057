"""The command line: compile, evaluate, export, tune, merge, run, inspect, selftest, targets.

Only `compile`, `evaluate`, `export` and `tune` need PyTorch, and these, `merge` and `targets` the compiler: the
other commands work on a device. A mistake prints what was wrong, where and what to do, and ends with 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from typer.core import TyperGroup

from qcompile.arrays import in_order, read_arrays, read_model
from qcompile.artifact import Artifact, TensorSpec
from qcompile.device import lacks, machine
from qcompile.errors import ConfigError, DeviceError, InputError, QcompileError
from qcompile.runtime import load, report

if TYPE_CHECKING:
    from collections.abc import Callable

out, err = Console(), Console(stderr=True)


class _Commands(TyperGroup):
    """Shows a user's mistake as text, not as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        # PyTorch's threads would else spin while they wait for one that another process keeps from its core.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            return super().invoke(ctx)
        except QcompileError as error:
            err.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compile PyTorch models to exact int8 machine code, and run them without PyTorch.",
)

ExportedFile = Annotated[Path, typer.Argument(help="a model that torch.export.save wrote (.pt2)", metavar="MODEL.pt2")]
Calibration = Annotated[
    Path | None,
    typer.Option(help="typical inputs: .npz, one array per input, first axis = samples; none for a quantized model"),
]
ModelFile = Annotated[Path, typer.Argument(help="a compiled model (.qcm)", metavar="MODEL.qcm")]
Threads = Annotated[int | None, typer.Option(help="threads for a call [default: all cores]")]
Batch = Annotated[int | None, typer.Option(min=1, help="samples per calibration step [default: the model's own]")]
WeightBits = Annotated[int, typer.Option(help="bits of a weight, 2 to 8")]
Activations = Annotated[str, typer.Option(help="static; or, for linear layers, dynamic or float")]


@app.command("compile")
def compile_command(
    model: ExportedFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="where the compiled model goes (.qcm)")],
    calibration: Calibration = None,
    target: Annotated[str, typer.Option(help="what to compile for; see `qcompile targets`")] = "native",
    batch: Batch = None,
    preset: Annotated[str | None, typer.Option(help="time to spend on accuracy: fast, balanced or best")] = None,
    weight_bits: WeightBits = 8,
    activations: Activations = "static",
    strict: Annotated[bool, typer.Option("--strict", help="refuse a model in which an operator stays float")] = False,
    tuning: Annotated[Path | None, typer.Option(help="a database that `qcompile tune` wrote")] = None,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="leave layers in float until so many top labels differ at most, such as 0.01")
    ] = None,
    evaluation: Annotated[Path | None, typer.Option(help="inputs to count that on: .npz, as for calibration")] = None,
    numerics: Annotated[str, typer.Option(help="int8, or for the whole model bfloat16 or float32")] = "int8",
    threads: Threads = None,
) -> None:
    """Compile a float model to int8 machine code."""
    from qcompile.compiler import compile
    from qcompile.config import QuantConfig
    from qcompile.tuning import Tuning

    config = QuantConfig(preset=preset, weight_bits=weight_bits, activations=activations)
    for option in ("preset", "weight_bits", "activations") if numerics != "int8" else ():
        if getattr(config, option) != getattr(QuantConfig(), option):
            name = f"--{option.replace('_', '-')}"
            raise ConfigError(
                f"{name} is given, but with --numerics {numerics} nothing is quantized",
                where=name,
                remedy=f"leave {name} or --numerics out",
            )
    program, batches, held_out = read_model(model, batch, calibration, evaluation)
    known = None if tuning is None else Tuning(tuning, measure=False)
    with _progress() as progress:
        compiled = compile(
            program,
            target,
            calibration=batches,
            config=None if config == QuantConfig() else config,
            tuning=known,
            strict=strict,
            threads=threads,
            progress=progress,
            max_accuracy_drop=max_accuracy_drop,
            evaluation=held_out,
            numerics=numerics,
        )
    compiled.save(output)
    if compiled.choices is not None:
        out.print(compiled.choices.table())
    counts = _counts(compiled.coverage)
    out.print(f"{output}: {output.stat().st_size:,} bytes for {compiled.target}; {counts}", highlight=False)


@app.command("export")
def export_command(
    model: ExportedFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="where the ONNX model goes (.onnx)")],
    calibration: Calibration = None,
    batch: Batch = None,
    preset: Annotated[str | None, typer.Option(help="time to spend on accuracy: fast, balanced or best")] = None,
    weight_bits: WeightBits = 8,
    activations: Annotated[str, typer.Option(help="int8, or uint8 (ONNX Runtime on x86 is faster with it)")] = "int8",
) -> None:
    """Quantize a float model and write it as ONNX (QDQ), for other engines."""
    from qcompile.config import QuantConfig
    from qcompile.export import export_onnx
    from qcompile.quantizer import quantize

    config = QuantConfig(preset=preset, weight_bits=weight_bits)
    program, batches = read_model(model, batch, calibration)
    with _progress() as progress:
        quantized = quantize(program, calibration=batches, config=config, progress=progress)
    export_onnx(quantized, output, activations=activations)  # type: ignore[arg-type]
    counts = _counts(quantized.coverage)
    out.print(f"{output}: {output.stat().st_size:,} bytes; {counts}", highlight=False)


@app.command()
def evaluate(
    compiled: ModelFile,
    model: Annotated[Path, typer.Option(help="the float model that it was compiled from (.pt2)")],
    data: Annotated[Path, typer.Option(help="inputs to compare on: .npz, one array per input, first axis = samples")],
    labels: Annotated[str | None, typer.Option(help="the array of the data that holds class indices")] = None,
    robustness: Annotated[
        bool, typer.Option("--robustness", help="also under noise, blur, brightness, contrast")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="what it was calibrated on: quantizes again, to compare every layer")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="with --calibration: the preset it was compiled with")] = None,
    weight_bits: Annotated[int, typer.Option(help="with --calibration: as it was compiled with")] = 8,
    activations: Annotated[str, typer.Option(help="with --calibration: as it was compiled with")] = "static",
    layers: Annotated[int, typer.Option(help="with --calibration: samples to compare layers on")] = 16,
    batch: Annotated[int | None, typer.Option(min=1, help="samples per step [default: the model's own]")] = None,
    html: Annotated[Path | None, typer.Option(help="write one HTML page here")] = None,
    json: Annotated[Path | None, typer.Option(help="write every number here")] = None,
    threads: Threads = None,
) -> None:
    """Compare a compiled model with its float model: quality, robustness, speed, storage, layers."""
    from qcompile.arrays import read_data
    from qcompile.config import QuantConfig
    from qcompile.evaluation import evaluate
    from qcompile.evaluation.again import with_layers
    from qcompile.evaluation.files import write
    from qcompile.exported import load_exported

    config = QuantConfig(preset=preset, weight_bits=weight_bits, activations=activations)
    if config != QuantConfig() and calibration is None:
        raise ConfigError(
            "how it was quantized is of no use here without the calibration data",
            where="--preset, --weight-bits, --activations",
            remedy="give --calibration as well, to quantize again and compare every layer",
        )
    loaded = load(compiled, threads=threads)
    with _progress() as progress:
        if calibration is None:
            program, layers = load_exported(model), 0
        else:
            program, batches = read_model(model, batch, calibration)
            assert batches is not None
            loaded = with_layers(loaded, program, batches, config=config, threads=threads, progress=progress)
        found = evaluate(
            loaded,
            program,
            read_data(program, data, batch, labels),
            labels=labels is not None,
            robustness=robustness,
            layers=layers,
            progress=progress,
        )
    for table in found.tables():
        out.print(table)
    for note in found.notes:
        out.print(f"note: {note}", markup=False, highlight=False)
    if html is not None:
        found.html(html)
    if json is not None:
        write(json, found.to_json())


@app.command()
def tune(
    model: ExportedFile,
    database: Annotated[
        Path, typer.Option("--database", "-d", help="what was found goes here, and is not measured again")
    ],
    calibration: Calibration = None,
    target: Annotated[str, typer.Option(help="what to tune for; see `qcompile targets`")] = "native",
    batch: Batch = None,
    device: Annotated[str | None, typer.Option(help="measure there: KEY@HOST:PORT of a TVM RPC tracker")] = None,
    threads: Threads = None,
) -> None:
    """Measure the fastest config of each kernel of a model; Ctrl-C keeps what was found."""
    from qcompile.quantizer import quantize
    from qcompile.targets import get
    from qcompile.targets.capability import objection
    from qcompile.targets.tune import check
    from qcompile.targets.tune import tune as tune_kernels
    from qcompile.tuning import Tuning

    where, tuning = get(target), Tuning(database, device=device)
    check(where, tuning, threads)  # it is better to know before calibrating
    program, batches = read_model(model, batch, calibration)
    found: list[Any] = []
    try:
        with _progress() as progress:
            quantized = quantize(program, calibration=batches, objection=objection(where), progress=progress)
            tune_kernels(quantized.program, where, tuning, threads, progress, found.append)
    except KeyboardInterrupt:
        err.print(f"stopped; {database} has what was found, and the same command goes on from there", highlight=False)
        raise typer.Exit(130) from None
    finally:
        if found:
            _show_tuned(found)
    out.print(f"{len(found)} kernels measured; compile with --tuning {database}", highlight=False)


@app.command("merge")
def merge_command(
    into: Annotated[Path, typer.Argument(help="the tuning database that takes the others in", metavar="INTO")],
    others: Annotated[list[Path], typer.Argument(help="tuning databases", metavar="FROM...")],
) -> None:
    """Bring what several devices found into one tuning database; the greater gain wins."""
    from qcompile.targets.database import Database

    for other in others:
        out.print(f"{other}: {Database(into).merge(other)} entries taken", highlight=False)


@app.command()
def run(
    model: ModelFile,
    input: Annotated[Path, typer.Option("--input", "-i", help=".npz with one array per input, by name or in order")],
    output: Annotated[Path, typer.Option("--output", "-o", help="where the outputs go (.npz), by name")],
    threads: Threads = None,
) -> None:
    """Run a compiled model on the inputs of a file."""
    loaded = load(model, threads=threads)
    given = read_arrays(input, InputError)
    results = loaded.flat(*in_order(given, [spec.name for spec in loaded.inputs], input))
    arrays: dict[str, Any] = {spec.name: array for spec, array in zip(loaded.outputs, results, strict=True)}
    np.savez(output, **arrays)
    for name, array in arrays.items():
        out.print(f"{name}: {array.dtype} {array.shape}", highlight=False)


@app.command()
def inspect(model: ModelFile) -> None:
    """Show what a compiled model takes and returns, what became of each operator, and its sizes."""
    artifact = Artifact.load(model)
    _table("inputs and outputs", ("", "name", "type", "quantization"), _interface(artifact))
    needs = [
        (v.name, v.machine, ", ".join(v.features), lacks(v.machine, v.features) or "runs") for v in artifact.variants
    ]
    _table("targets", ("name", "machine", "needs", "here"), needs)
    passes = [
        (row.name, "yes" if row.changed else "no", str(row.nodes_before), str(row.nodes_after))
        for row in artifact.passes
    ]
    _table("passes", ("pass", "changed", "nodes before", "after"), passes)
    ledger = [(row.op, row.node, row.kind, row.kernel, row.where, row.reason) for row in artifact.coverage]
    title = f"operators: {_counts(artifact.coverage)}"
    _table(title, ("operator", "node", "kind", "kernel", "where", "why float"), ledger)
    _table("sizes", ("member", "bytes"), [(name, f"{size:,}") for name, size in artifact.sizes().items()])
    exact = "bit for bit" if artifact.exact else f"within {artifact.tolerance:g} of the largest output (floats remain)"
    built = ", ".join(f"{name} {version}" for name, version in artifact.toolchain.items())
    out.print(f"outputs are reproducible {exact}; built with {built or 'unknown tools'}", highlight=False)


@app.command()
def selftest(model: ModelFile, threads: Threads = None) -> None:
    """Replay the golden vectors on this machine, and time a call."""
    passed, table = report(load(model, threads=threads))
    print(table)
    if not passed:
        raise typer.Exit(1)


@app.command()
def targets() -> None:
    """List what can be compiled for, and what this machine can run."""
    from qcompile.targets import get, names

    native = get("native").name
    try:
        gpu = get("cuda").name
    except DeviceError:  # there is none, and each row says so
        gpu = ""
    rows = []
    for target in (get(name) for name in names() if name != "native"):
        here = lacks(target.machine, target.features) or "runs" + {native: ": native", gpu: ": cuda"}.get(
            target.name, ""
        )
        rows.append((target.name, target.machine, ", ".join(target.features), here))
    _table(f"targets (this machine: {machine()[0]})", ("name", "machine", "needs", "here"), rows)


def _show_tuned(found: Sequence[Any]) -> None:
    rows = [
        (
            t.shape,
            t.default,
            t.kernel,
            f"{t.seconds * 1e6:.1f}",
            f"{t.gain:.2f} x",
            f"{t.candidates - len(t.failed)} of {t.candidates}",
        )
        for t in found
    ]
    _table("tuned kernels", ("layer", "default", "fastest", "us", "gain", "candidates"), rows)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A callback (step, done, total or None) that draws a bar for each step."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(step: str, done: int, total: int | None) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield advance


def _counts(coverage: Sequence[Any]) -> str:
    kinds = [row.kind for row in coverage]
    always = ("integer", "float", "shape")
    known = ("integer", "weight-only", "float", "bfloat16", "shape")
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in known if kind in always or kind in kinds)


def _interface(artifact: Artifact) -> list[tuple[str, ...]]:
    def row(side: str, spec: TensorSpec) -> tuple[str, ...]:
        known = spec.scale is not None
        return side, spec.name, spec.text, f"scale {spec.scale:.9g}, zero point {spec.zero_point}" if known else ""

    return [row("input", s) for s in artifact.inputs] + [row("output", s) for s in artifact.outputs]


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table)


if __name__ == "__main__":
    app()
