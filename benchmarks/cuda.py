"""`make bench-cuda`: int8 networks of this project on the GPU of this machine, beside PyTorch on it, in one run.

    python -m benchmarks.cuda [--models resnet50 ...] [--batches 1 32 256] [--sizes 4096 8192]
                              [--mode max-autotune] [--rounds 15] [--page-only]

PyTorch runs the same weights in bfloat16, channels last, compiled by `torch.compile`; for products of matrices it is
`torch._int_mm`, which is cuBLASLt's. Inputs lie on the GPU, and all is called on one stream, in turns. What is not bit
for bit what a processor computes is not timed. Writes docs/cuda.json after every row, and the tables of docs/cuda.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, fx, nn
from torch._C._autograd import DeviceType
from torch._subclasses.fake_tensor import FakeTensorMode

import qcompile
from benchmarks.figures import COUNT, MILLISECONDS, TEXT, TIMES, Figures
from benchmarks.machine import commit, machine
from benchmarks.measured import Measured, filled
from qcompile import device
from qcompile.artifact import Artifact, TensorSpec
from qcompile.errors import DeviceError, QcompileError
from qcompile.ir import InputSpec, Program, Stage, add_constant, propagate
from qcompile.runtime import Model
from qcompile.specs import output_specs
from qcompile.targets import Target, get
from qcompile.targets.build import build

JSON, PAGE = Path("docs/cuda.json"), Path("docs/cuda.md")
MODELS, BATCHES, SIZES = ("resnet50", "mobilenetv2", "efficientnet_lite0"), (1, 32, 256), (4096, 8192)
MODES = ("max-autotune", "reduce-overhead", "default")
COUNTED = ("resnet50", 1)  # the model and the batch whose launches are counted
CALIBRATION, SECONDS = 64, 0.05  # samples at least; of calls in a block
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
NO_KERNELS = ("Memcpy", "Memset")

_TIMES = {"int8, ms": MILLISECONDS, "PyTorch, ms": MILLISECONDS, "speed": TIMES}
NETWORKS = {"network": TEXT, "batch": COUNT, **_TIMES}
PRODUCTS = {"rows x in x out": TEXT, **_TIMES}
COUNTS = {"": TEXT, "kernels": COUNT, "launches by the processor": COUNT}
Run = Callable[[], Any]
Clock = Callable[[Run, int], float]


# --- what is measured ---------------------------------------------------------------------------------------------


def integer_network(model: nn.Module, batches: Sequence[Tensor], target: Target) -> Program:
    """`model` quantized, every operator of it integer; raises StrictError where one is not."""
    from qcompile.coverage import refuse_float

    program = qcompile.quantize(model, calibration=batches).program
    refuse_float(program, runs=False)
    return program


def product(rows: int, features: int, outputs: int) -> Program:
    """One linear layer of random int8 weights, from int8 to int8."""
    g = torch.Generator().manual_seed(0)
    graph_module = fx.GraphModule(nn.Module(), fx.Graph())
    graph = graph_module.graph
    x = graph.placeholder("x")
    x.meta["val"] = FakeTensorMode().from_tensor(torch.empty(rows, features, dtype=torch.int8))
    constants = [
        add_constant(graph_module, "weight", integers((outputs, features), 127, g)),
        add_constant(graph_module, "bias", torch.randint(-1000, 1000, (outputs,), dtype=torch.int32, generator=g)),
        add_constant(graph_module, "m", (torch.rand(outputs, generator=g) + 0.5) * 0.01 / features**0.5),
    ]
    graph.output((graph.call_function(torch.ops.qcompile.linear.default, (x, *constants, 3, -5, -128, 127)),))
    graph_module.recompile()
    spec = InputSpec("x", (rows, features), "int8")
    program = Program(graph_module, Stage.INTEGER, (spec,), 0)
    propagate(program)
    return program


def integers(shape: tuple[int, ...], most: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-most, most + 1, shape, dtype=torch.int8, generator=generator)


def artifact(program: Program, target: Target) -> Artifact:
    """Machine code of `program`, without golden vectors: those of large batches take a processor long."""
    return Artifact(
        inputs=tuple(TensorSpec(spec.name, spec.shape, spec.dtype) for spec in program.inputs),
        outputs=output_specs(program),
        output_structure=program.output_structure,
        variants=(build(program, target).variant(target),),
    )


def wrong(model: Model, program: Program, x: Tensor, by_reference: int) -> int:
    """How many elements of the outputs for `x` are, in any bit, not what a processor computes: this project's machine
    code there and, for the first `by_reference` samples, which it must be able to take, the reference too."""
    (got,) = model.flat(x.numpy())
    wanted = [Model(artifact(program, get("native"))).flat(x.numpy())[0]]
    if by_reference:
        wanted += [y.contiguous().numpy() for y in program(x[:by_reference])]
    view = f"u{got.itemsize}"
    return max(int((got[: len(want)].view(view) != want.view(view)).sum()) for want in wanted)


# --- measuring ----------------------------------------------------------------------------------------------------


def events(run: Run, calls: int) -> float:
    """Seconds of a call, of `calls` in a row, by the GPU's own clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / calls


def profiled(run: Run, calls: int) -> float:
    """Seconds that the longest kernel of a call takes, the mean of `calls`: without copies into its layout and back."""
    traces = [traced(run) for _ in range(calls)]
    found = [[event.time_range.elapsed_us() for event in trace if _is_kernel(event)] for trace in traces]
    return sum(map(max, found)) / calls / 1e6


def interleave(runs: Mapping[str, Run], rounds: int, clock: Clock = events) -> dict[str, list[float]]:
    """Seconds of a call of each of `runs`, a block of each in every round."""
    calls = {}
    for name, run in runs.items():
        for _ in range(3):
            run()
        calls[name] = max(1, round(SECONDS / max(clock(run, 3), 1e-7))) if clock is events else 5
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(clock(runs[name], calls[name]))
    return times


def compared(times: Mapping[str, list[float]], ours: str, theirs: str) -> list[float]:
    """Milliseconds of ours and theirs, and how many times faster ours is: medians, that of the ratio within a round."""
    ratio = statistics.median(b / a for a, b in zip(times[ours], times[theirs], strict=True))
    return [1e3 * statistics.median(times[ours]), 1e3 * statistics.median(times[theirs]), ratio]


def traced(run: Run) -> list[Any]:
    """What PyTorch's profiler saw of one call, on the processor and on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return list(trace.events())


def _is_kernel(event: Any) -> bool:
    return event.device_type == DeviceType.CUDA and not event.name.startswith(NO_KERNELS)


def counts(trace: Sequence[Any]) -> list[int]:
    """Kernels that ran, and launches (a graph of kernels is one) that they took."""
    return [sum(map(_is_kernel, trace)), sum(event.name in LAUNCHES for event in trace)]


# --- the rows -----------------------------------------------------------------------------------------------------


class Bench:
    """One run: what was found so far, and where it is written."""

    def __init__(self, target: Target, mode: str, rounds: int, found: Measured) -> None:
        self.target, self.mode, self.rounds, self.found, self.console = target, mode, rounds, found, Console(width=110)
        tables = {"networks": NETWORKS, "products": PRODUCTS, "launches": COUNTS}
        found.figures = {name: {name: Figures(columns, [])} for name, columns in tables.items()}

    def add(self, table: str, row: list[Any]) -> None:
        figures = self.found.figures[table][table]
        figures.rows.append(row)
        self.console.print(dict(zip(figures.columns, row, strict=True)))
        write(self.found)

    def note(self, table: str, what: str, reason: object) -> None:
        said = f"{what}: {str(reason).splitlines()[0]}"
        self.found.figures[table][table].notes.append(said)
        self.console.print(said, markup=False)
        write(self.found)

    def network(self, name: str, batch: int) -> None:
        from benchmarks.models import MODELS as NETS
        from benchmarks.models import samples

        net = NETS[name]()
        calibration = samples(name, max(batch, CALIBRATION) // batch * batch, seed=1).split(batch)
        program = integer_network(net, calibration, self.target)
        x = samples(name, batch, seed=2)
        model = Model(artifact(program, self.target))
        if count := wrong(model, program, x, by_reference=1 if batch == 1 else 0):
            return self.note("networks", f"{name}, batch {batch}", f"not timed: {count} elements are wrong")
        given, peer = x.cuda(), bfloat16(net, x, self.mode)
        runs: dict[str, Run] = {"int8": lambda: model(given), "PyTorch": peer}
        with torch.inference_mode():
            times = interleave(runs, self.rounds)
            self.add("networks", [name, batch, *compared(times, "int8", "PyTorch")])
            if (name, batch) == COUNTED:
                for engine, run in runs.items():
                    self.add("launches", [f"{name}, batch {batch}, {engine}", *counts(traced(run))])

    def product(self, rows: int, features: int) -> None:
        title = f"{rows} x {features} x {features}"
        program = product(rows, features, features)
        model = Model(artifact(program, self.target))
        x = integers((rows, features), 127, torch.Generator().manual_seed(1))
        if count := wrong(model, program, x, by_reference=16):
            return self.note("products", title, f"not timed: {count} elements are wrong")
        given = x.cuda()
        weight = integers((features, features), 127, torch.Generator().manual_seed(2)).cuda().t()
        runs: dict[str, Run] = {"int8": lambda: model(given), "torch": lambda: torch._int_mm(given, weight)}
        self.add("products", [title, *compared(interleave(runs, self.rounds, profiled), "int8", "torch")])

    def attempt(self, table: str, what: str, row: Run) -> None:
        """One row; where it fails, the table says why, and the others go on."""
        try:
            row()
        except (QcompileError, RuntimeError) as error:
            self.note(table, what, f"{type(error).__name__}: {error}")


def bfloat16(net: nn.Module, x: Tensor, mode: str) -> Run:
    """`net` in PyTorch as it is fastest there, on `x`; compiled at the first call."""
    torch._dynamo.reset()  # of the network before
    ready: Any = net.to("cuda", torch.bfloat16)
    ready = ready.to(memory_format=torch.channels_last)
    compiled = torch.compile(ready, mode=mode)
    given = x.to("cuda", torch.bfloat16, memory_format=torch.channels_last)
    return lambda: compiled(given)


# --- what is written ----------------------------------------------------------------------------------------------


def blocks(found: Measured | None) -> dict[str, str]:
    """What stands between the marks of the page; nothing where nothing was measured."""
    if found is None:
        return {}
    tables = {name: of[name] for name, of in found.figures.items()}
    return {
        "machine": found.place(),
        **{name: figures.markdown() for name, figures in tables.items() if figures.rows or figures.notes},
    }


def write(found: Measured, json: Path = JSON, page: Path = PAGE) -> None:
    found.save(json)
    page.write_text(filled(page.read_text(), blocks(Measured.load(json))))  # rounded as it is kept


def place() -> dict[str, str]:
    """The machine, with its GPU."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {"GPU": f"{torch.cuda.get_device_name(0)}, driver {driver}, CUDA {torch.version.cuda}", **machine()}


def require_gpu() -> Target:
    """The target of this machine's GPU.

    Raises:
        DeviceError: there is none, or PyTorch cannot use it.
    """
    target = get("cuda")
    if not torch.cuda.is_available():
        raise DeviceError(
            f"this PyTorch ({torch.__version__}) cannot use the GPU, and it is what is measured against",
            remedy="install one that is built for CUDA 13",
        )
    assert device.gpu() is not None
    return target


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES, help="rows, inputs and outputs of products")
    parser.add_argument("--mode", choices=MODES, default=MODES[0], help="of torch.compile")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--page-only", action="store_true", help="write the page from docs/cuda.json alone")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    if options.page_only:
        return write(Measured.load(JSON))
    try:
        target = require_gpu()
    except DeviceError as error:
        raise SystemExit(f"error: {error}") from None
    versions = {name: version(name) for name in ("torch", "apache-tvm")} | {"commit": commit()}
    versions["torch.compile"] = options.mode
    bench = Bench(target, options.mode, options.rounds, Measured(place(), versions, {}))
    for size in options.sizes:
        bench.attempt("products", f"{size} x {size} x {size}", partial(bench.product, size, size))
    for name in options.models:
        for batch in options.batches:
            bench.attempt("networks", f"{name}, batch {batch}", partial(bench.network, name, batch))


if __name__ == "__main__":
    main()
