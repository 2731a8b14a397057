"""NVIDIA GPUs: rows and targets, one for each generation whose integer instructions differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcompile.targets.base import InstructionSet, Target


@dataclass(frozen=True, kw_only=True)
class Gpu(InstructionSet):
    """The row of a GPU; its instructions are in `targets/cuda/device/instructions.cuh`.

    Attributes:
        capability: its compute capability, as 10 * major + minor.
        tensor_cores: whether they multiply int8.
        stages: tiles that are copied to shared memory while one is multiplied, and that one: 2 where copies are not
            asynchronous.
        shared_bytes: of shared memory that a block may have.
        processors: streaming multiprocessors of a typical one, for choosing tiles.
    """

    capability: int
    tensor_cores: bool
    stages: int
    shared_bytes: int
    processors: int

    @property
    def whole_words(self) -> bool:
        return True

    @property
    def architecture(self) -> str:
        """As compilers call it, and the feature that an artifact for it needs."""
        return f"sm_{self.capability}"


def _gpu(capability: int, stages: int, shared_kib: int, processors: int, tensor_cores: bool = True) -> Gpu:
    return Gpu(
        storage="int8",
        lanes=4,
        registers=255,
        dots=(),
        capability=capability,
        tensor_cores=tensor_cores,
        stages=stages,
        shared_bytes=shared_kib << 10,
        processors=processors,
    )


SM_61 = _gpu(61, 2, 48, 28, tensor_cores=False)  # Pascal
SM_75 = _gpu(75, 2, 64, 40)  # Turing
SM_80 = _gpu(80, 4, 163, 108)  # Ampere
SM_89 = _gpu(89, 4, 99, 128)  # Ada
SM_90 = _gpu(90, 4, 227, 132)  # Hopper

# Of the processor that calls it only what all of its kind have: it launches kernels and computes addresses.
_HOST: dict[str, Any] = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"}


def _target(gpu: Gpu) -> Target:
    return Target(
        name=f"cuda-{gpu.architecture}",
        machine="x86_64",
        features=(gpu.architecture,),
        tvm={"kind": "cuda", "arch": gpu.architecture, "host": _HOST},
        isa=gpu,
        linkers=("gcc", "cc", "clang", "ld.lld", "x86_64-linux-gnu-ld", "ld"),
        rank=gpu.capability,
    )


TARGETS = tuple(map(_target, (SM_61, SM_75, SM_80, SM_89, SM_90)))
