"""Running integer programs on every target: calls of the op table become one graph, one library, one run.

A `Case` is one library with what it must answer. It is run on two sets of random inputs: the allocator
gives the second run the memory of the first, so whatever a kernel leaves unwritten shows as stale data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from arm import ArmMachine
from gpu_machine import REAL, GpuMachine, compiling
from gpu_table import record
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from qcompile.artifact import Artifact, TensorSpec
from qcompile.device import lacks
from qcompile.errors import BuildError
from qcompile.ir import InputSpec, Program, Stage, add_constant, propagate
from qcompile.ops import Act, Row, Sample
from qcompile.runtime import Model
from qcompile.specs import output_specs
from qcompile.targets import Target, get, names
from qcompile.targets.build import build
from qcompile.targets.cuda.compile import compiler
from qcompile.targets.nvidia import Gpu

TARGETS = tuple(name for name in names() if name != "native")
CUDA = tuple(name for name in TARGETS if isinstance(get(name).isa, Gpu))
X86 = tuple(name for name in TARGETS if get(name).machine == "x86_64" and name not in CUDA)
CPUS = tuple(name for name in TARGETS if name not in CUDA)
ARM = tuple(name for name in TARGETS if get(name).machine == "aarch64")


def native_vectors() -> str:
    """The best target of this machine that has no matrix unit: there are machines with one and without."""
    able = [name for name in X86 if get(name).isa.matrix is None and not lacks("x86_64", get(name).features)]
    return max(able, key=lambda name: get(name).rank) if able else get("native").name


def quick(targets: Sequence[str], gpus: Sequence[str] = ("cuda-sm_61", "cuda-sm_80")) -> list[Any]:
    """Parameters for the sweeps of integer kernels. Of the targets with AVX-512, whose integers mostly go the same way,
    `make test` takes the best one that this machine can run; of GPUs `gpus`: one with tensor cores, and one without."""
    alike = {name for name in X86 if "avx512f" in get(name).features}
    able = [name for name in alike if not lacks("x86_64", get(name).features)]
    best = max(able, key=lambda name: get(name).rank, default=None)
    slow = (alike - {best}) | (set(CUDA) - set(gpus))
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (name in slow) + [pytest.mark.cuda] * (name in CUDA))
        for name in targets
    ]


def program_of(
    calls: Sequence[tuple[Any, Sample]], batch: tuple[int, int] | None = None
) -> tuple[Program, list[Tensor]]:
    """One integer program whose outputs are the results of `calls` (operator, arguments), and the
    activations among the arguments: its inputs.

    With `batch` (smallest, largest) the first dimension of every activation is dynamic; they must be equal.
    """
    graph_module = fx.GraphModule(torch.nn.Module(), fx.Graph())
    graph = graph_module.graph
    leaves, structure = pytree.tree_flatten([(sample.args, sample.kwargs) for _, sample in calls])
    activations = [leaf.tensor for leaf in leaves if isinstance(leaf, Act)]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    inputs = []
    for i, tensor in enumerate(activations):
        dynamic = [DimDynamic.DUCK if batch and d == 0 else DimDynamic.STATIC for d in range(tensor.dim())]
        node = graph.placeholder(f"x{i}")
        node.meta["val"] = mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic))
        sizes = (("batch", *batch), *tensor.shape[1:]) if batch else tuple(tensor.shape)
        inputs.append(InputSpec(f"x{i}", sizes, str(tensor.dtype).removeprefix("torch.")))
    placeholders = iter(list(graph.nodes))
    nodes = [
        next(placeholders) if isinstance(leaf, Act)
        else add_constant(graph_module, f"c{i}", leaf) if isinstance(leaf, Tensor)
        else leaf
        for i, leaf in enumerate(leaves)
    ]  # fmt: skip
    outputs = [
        graph.call_function(op, args, kwargs)
        for (op, _), (args, kwargs) in zip(calls, pytree.tree_unflatten(nodes, structure), strict=True)
    ]
    graph.output(tuple(outputs))
    graph_module.recompile()
    program = Program(graph_module, Stage.INTEGER, tuple(inputs), {"list": list(range(len(outputs)))})
    propagate(program)
    return program, activations


def operator(row: Row) -> Any:
    """What the integer graph calls for `row`."""
    return row.reference if row.schema is None else row.op


def artifact_of(program: Program, target: Target) -> Artifact:
    """`program`, compiled for `target`."""
    with compiling():
        built = build(program, target)
    variant = built.variant(target)
    return Artifact(
        inputs=tuple(TensorSpec(spec.name, spec.shape, spec.dtype) for spec in program.inputs),
        outputs=output_specs(program),
        output_structure=program.output_structure,
        variants=(variant,),
    )


def run_on(
    artifact: Artifact, cases: Sequence[Sequence[Tensor]], request: pytest.FixtureRequest
) -> list[list[np.ndarray]]:
    """The flat outputs of `artifact` for each case of flat inputs, one after the other on one machine.

    ARM code runs on the session's ARM machine; code that this machine cannot run skips the test.
    """
    arrays = [[x.numpy() for x in case] for case in cases]
    (variant,) = artifact.variants
    if variant.machine == "aarch64":
        machine: ArmMachine = request.getfixturevalue("arm_machine")
        return machine.run_all(artifact, arrays)
    if variant.name in CUDA:
        gpu: GpuMachine = request.getfixturevalue("gpu")
        return gpu.run_all(artifact, arrays)
    skip_unless_runnable(variant.name)
    model = Model(artifact)
    return [model.flat(*case) for case in arrays]


def skip_unless_runnable(name: str) -> None:
    """Skip a target whose instructions this machine lacks. ARM is emulated, and so are GPUs unless there is one."""
    target = get(name)
    if name in ARM or (name in CUDA and not REAL):
        return
    if reason := lacks(target.machine, target.features):
        pytest.skip(f"{name}: this machine {reason}")
    if isinstance(target.isa, Gpu):
        try:
            compiler(target.isa)
        except BuildError as error:
            pytest.skip(f"{name}: {error.what}")


def reshuffled(x: Tensor, generator: torch.Generator) -> Tensor:
    """The values of `x` in another order: other data of the same kind."""
    return x.reshape(-1)[torch.randperm(x.numel(), generator=generator)].reshape(x.shape)


def different(got: np.ndarray, want: Tensor) -> int:
    """How many elements differ in any bit; all of them when shape or type do."""
    expected = want.contiguous().numpy()
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return max(1, expected.size)
    bits = np.dtype(f"u{expected.itemsize}")
    return int(np.count_nonzero(np.ascontiguousarray(got).view(bits) != expected.view(bits)))


@dataclass(frozen=True)
class Mismatch:
    """One output that is not the reference's."""

    label: str
    elements: int
    total: int


def mismatches(
    program: Program, first: Sequence[Tensor], labels: Sequence[str], target: str, request: pytest.FixtureRequest
) -> list[Mismatch]:
    """Compile `program` for `target`, run it on `first` and on the same values in another order, and
    compare every output of both runs with the reference."""
    generator = torch.Generator().manual_seed(11)
    cases = [list(first), [reshuffled(x, generator) for x in first]]
    skip_unless_runnable(target)
    results = run_on(artifact_of(program, get(target)), cases, request)
    found = []
    for run, (inputs, outputs) in enumerate(zip(cases, results, strict=True)):
        for label, got, want in zip(labels, outputs, program(*inputs), strict=True):
            count = different(got, want)
            record(request.node, count, want.numel())
            if count:
                found.append(Mismatch(f"run {run}: {label}", count, want.numel()))
    return found
