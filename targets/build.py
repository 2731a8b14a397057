"""Integer program -> machine code: lower, compile with TVM, link a shared library."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompile.artifact import Variant
from qcompile.errors import BuildError
from qcompile.ir import Program, source, where
from qcompile.sites import is_computed
from qcompile.targets.base import Target
from qcompile.targets.blame import culprit
from qcompile.targets.cuda import compile as cuda
from qcompile.targets.emitters import emitters_for
from qcompile.targets.lower import lower
from qcompile.targets.nvidia import Gpu
from qcompile.targets.pipeline import NAME
from qcompile.targets.workload import Chosen

Progress = Callable[[str], None]


# TVM's default pipeline without RewriteDataflowReshape, which expects every function to be a schedulable
# block; reshapes of activations are already views.
_PASSES = (
    relax.transform.LegalizeOps(),
    relax.transform.ToNonDataflow(),
    relax.transform.RemovePurityChecking(),
    relax.transform.CallTIRRewrite(),
    relax.transform.StaticPlanBlockMemory(),
    relax.transform.RewriteCUDAGraph(),  # of a GPU's kernels all but the first and last are launched as one
    relax.transform.LowerAllocTensor(),
    relax.transform.KillAfterLastUse(),
    relax.transform.LowerRuntimeBuiltin(),
    relax.transform.ComputePrimValue(),
    relax.transform.VMShapeLower(),
    relax.transform.AttachGlobalSymbol(),
)


@dataclass(frozen=True)
class Built:
    """Machine code for one target.

    Attributes:
        library: a shared object: a Relax VM executable with the function main(*inputs, constants).
        constants: the tensors of `constants`, in order.
        kernels: which kernel computes which node of the integer graph.
        alignments: of each input, in bytes.
        device_code, device_kernels: what runs on a GPU, and what TVM must know to launch it; empty for a CPU.
    """

    library: bytes
    constants: dict[str, np.ndarray]
    kernels: dict[str, str]
    alignments: tuple[int, ...]
    device_code: bytes = b""
    device_kernels: str = ""

    def variant(self, target: Target) -> Variant:
        """What an artifact holds of it."""
        return Variant(
            target.name,
            target.machine,
            target.features,
            target.rank,
            self.library,
            self.constants,
            self.device_code,
            self.device_kernels,
            self.alignments,
        )


def linker(target: Target) -> str:
    """The first linker of `target` on this machine.

    Raises:
        BuildError: there is none.
    """
    for name in target.linkers:
        if shutil.which(name):
            return name
    raise BuildError(
        f"no linker for {target.name} on this machine",
        where=f"looked for {', '.join(target.linkers)}",
        remedy="install one of them (Debian and Ubuntu: apt install gcc for x86, binutils-aarch64-linux-gnu for ARM)",
    )


def tools(target: Target) -> str:
    """The linker of `target`; that its compilers are there too is found before any work.

    Raises:
        BuildError: one of them is not.
    """
    if isinstance(target.isa, Gpu):
        cuda.compiler(target.isa)
    return linker(target)


def build(program: Program, target: Target, progress: Progress | None = None, chosen: Chosen | None = None) -> Built:
    """Compile an integer program for `target`; `progress` hears the name of each step, `chosen` is what
    tuning found.

    Raises:
        BuildError: an operator that cannot be lowered, or no linker.
    """
    say = progress or (lambda step: None)
    command = tools(target)
    say("lowering")
    lowered = lower(program, target, emitters_for(target), chosen)
    say("compiling")
    device_code = cuda.compiled(lowered.entries, target.isa) if isinstance(target.isa, Gpu) else b""
    try:
        executable = compile_module(lowered.module, target.tvm)
    except Exception as error:  # TVM raises many types
        raise _not_built(program, target, error) from error
    say("linking")
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        path = Path(folder) / "model.so"
        link(executable, path, command)
        library = path.read_bytes()
    device_kernels = cuda.information_of(lowered.entries) if device_code else ""
    return Built(library, lowered.constants, lowered.kernels, lowered.alignments, device_code, device_kernels)


def compile_module(
    module: tvm.IRModule, tvm_target: dict[str, Any], exec_mode: str = "compiled", keep_unused: bool = False
) -> Any:
    """A Relax module as an executable; `keep_unused`: with the calls whose results nobody reads."""
    first = () if keep_unused else (relax.transform.DeadCodeElimination(["main"]),)
    pipeline = tvm.transform.Sequential([*first, *_PASSES])
    target = tvm.target.Target(tvm_target)
    with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": target.kind.name == "cuda"}):
        return relax.build(module, target, relax_pipeline=pipeline, tir_pipeline=NAME, exec_mode=exec_mode)


def _not_built(program: Program, target: Target, error: Exception) -> BuildError:
    """What TVM failed with, and at which operator."""
    found = culprit(program, lambda part: compile_module(lower(part, target, emitters_for(target)).module, target.tvm))
    if found is None:
        return BuildError(
            f"TVM could not build the model for {target.name}: {error}",
            where="no single operator: "
            + ", ".join(sorted({str(n.target) for n in program.graph.nodes if is_computed(n)})),
            remedy="exclude the layers that stay float from the model, one by one, to find the two that do not fit",
        )
    node, reason = found
    return BuildError(
        f"{node.target} stays float, but TVM could not build it for {target.name}: {reason}",
        where=where(node) or node.name,
        source=source(node),
        remedy="write it with other operators, or move it out of the compiled model",
    )


def link(executable: Any, path: Path, command: str) -> None:
    """Write a shared object; a bare linker is enough, the objects need no C library."""

    def run(output: str, objects: list[str], options: Any = None, **_: Any) -> None:
        result = subprocess.run(
            [command, "-shared", "-o", output, *objects], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise BuildError(f"{command} failed", where=output, remedy=result.stderr.strip() or "see its output")

    run.object_format = "o"  # type: ignore[attr-defined]
    executable.export_library(str(path), fcompile=run)
