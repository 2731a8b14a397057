"""The command line: compile, run, inspect, selftest, targets.

Only `compile` imports PyTorch, and only `compile` and `targets` the compiler: the other commands work
on a device. A mistake prints what was wrong, where and what to do, and ends with 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from qcompile.artifact import Artifact, CoverageRow, TensorSpec
from qcompile.device import lacks, machine
from qcompile.errors import CalibrationError, InputError, QcompileError
from qcompile.runtime import load, report

if TYPE_CHECKING:
    from collections.abc import Callable

out, err = Console(), Console(stderr=True)


class _Commands(TyperGroup):
    """Shows a user's mistake as text, not as a traceback."""

    def invoke(self, ctx: Any) -> Any:
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

ModelFile = Annotated[Path, typer.Argument(help="a compiled model (.qcm)", metavar="MODEL.qcm")]
Threads = Annotated[int | None, typer.Option(help="threads for a call [default: all cores]")]


@app.command("compile")
def compile_command(
    model: Annotated[Path, typer.Argument(help="a model that torch.export.save wrote (.pt2)", metavar="MODEL.pt2")],
    calibration: Annotated[Path, typer.Option(help="typical inputs: .npz, one array per input, first axis = samples")],
    output: Annotated[Path, typer.Option("--output", "-o", help="where the compiled model goes (.qcm)")],
    target: Annotated[str, typer.Option(help="what to compile for; see `qcompile targets`")] = "native",
    batch: Annotated[int | None, typer.Option(help="samples per calibration step [default: the model's own]")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="refuse a model in which an operator stays float")] = False,
) -> None:
    """Compile a float model to int8 machine code."""
    from qcompile.compiler import compile
    from qcompile.exported import example_batch, load_exported

    program = load_exported(model)
    samples = _read_arrays(calibration, CalibrationError)
    names = list(program.graph_signature.user_inputs)
    batches = _batches(samples, batch or example_batch(program), names, calibration)
    with _progress() as progress:
        compiled = compile(program, target, calibration=batches, strict=strict, progress=progress)
    compiled.save(output)
    counts = _counts(compiled.coverage)
    out.print(f"{output}: {output.stat().st_size:,} bytes for {compiled.target}; {counts}", highlight=False)


@app.command()
def run(
    model: ModelFile,
    input: Annotated[Path, typer.Option("--input", "-i", help=".npz with one array per input, by name or in order")],
    output: Annotated[Path, typer.Option("--output", "-o", help="where the outputs go (.npz), by name")],
    threads: Threads = None,
) -> None:
    """Run a compiled model on the inputs of a file."""
    loaded = load(model, threads=threads)
    given = _read_arrays(input, InputError)
    results = loaded.flat(*_in_order(given, [spec.name for spec in loaded.inputs]))
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
    rows = []
    for target in (get(name) for name in names() if name != "native"):
        here = lacks(target.machine, target.features) or ("runs: native" if target.name == native else "runs")
        rows.append((target.name, target.machine, ", ".join(target.features), here))
    _table(f"targets (this machine: {machine()[0]})", ("name", "machine", "needs", "here"), rows)


def _read_arrays(path: Path, kind: type[QcompileError]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; raises `kind`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if isinstance(file, np.ndarray):
                raise ValueError("it holds one bare array")
            arrays = {name: file[name] for name in file.files}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError("it holds something other than arrays")
            return arrays
    except (OSError, ValueError, EOFError, AttributeError) as error:
        raise kind(
            f"the arrays cannot be read: {error}", where=str(path), remedy="give a file that numpy.savez wrote"
        ) from error


def _batches(samples: dict[str, np.ndarray], size: int, names: Sequence[str], path: Path) -> list[tuple[Any, ...]]:
    """Slices of `size` samples of each array, as torch tensors in the order of the inputs `names`.

    Arrays of other names are taken in the order of the file.
    """
    import torch

    counts = {name: len(array) if array.ndim else 0 for name, array in samples.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise CalibrationError(
            f"the arrays have different numbers of samples ({listed})",
            where=str(path),
            remedy="stack the samples of each input along the first axis",
        )
    total = next(iter(counts.values()), 0)
    tensors = [torch.from_numpy(array) for array in _in_order(samples, names)]
    return [tuple(t[start : start + size] for t in tensors) for start in range(0, total, size)]


def _in_order(arrays: dict[str, np.ndarray], names: Sequence[str]) -> list[np.ndarray]:
    """By name where all names are the model's, else as they come."""
    return [arrays[name] for name in names] if set(names) == set(arrays) else list(arrays.values())


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """A callback (step, done, total or None) that draws a bar for each step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(step: str, done: int, total: int | None) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield advance


def _counts(coverage: tuple[CoverageRow, ...]) -> str:
    kinds = [row.kind for row in coverage]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("integer", "float", "shape"))


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
