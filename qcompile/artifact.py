"""The artifact: everything a device needs to run a compiled model, in one `.qcm` file.

    manifest.json               what the model takes and returns, what it was built with and for, the ledger
    targets/<name>/library.so   machine code, one per target
    targets/<name>/constants.safetensors   packed weights, mapped where they lie
    targets/<name>/device_code   kernels of a GPU, where the target has one
    golden.safetensors          a few inputs with the outputs they must give

An `Artifact` is a plain value: the compiler makes one in memory, `save` writes it, `load` reads it.
See `qcompile.container` for the file, its checks and what they do and do not protect against.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from qcompile import container, tensors
from qcompile.errors import ArtifactError

if TYPE_CHECKING:
    from pathlib import Path

_ALIGNMENTS = (1, 2, 4, 8, 16, 32, container.ALIGNMENT)
Dimension = int | tuple[str, int, int]
"""A number, or (symbol, smallest, largest)."""


class TensorSpec(NamedTuple):
    """One input or output of the model.

    Attributes:
        name: as the model names it.
        shape: a dimension is a number, or (symbol, smallest, largest); equal symbols are equal numbers.
        dtype: as NumPy names it.
        scale, zero_point: how the model quantizes it inside, where it does: real = scale * (q - zero_point).
        path: of an input inside of the model's arguments: the argument, then keys and positions in it; () where it
            is the argument `name`.
    """

    name: str
    shape: tuple[Dimension, ...]
    dtype: str
    scale: float | None = None
    zero_point: int | None = None
    path: tuple[str | int, ...] = ()

    @property
    def text(self) -> str:
        """For people: "float32 (batch 1..8, 3, 224, 224)"."""
        sizes = [str(d) if isinstance(d, int) else f"{d[0]} {d[1]}..{d[2]}" for d in self.shape]
        return f"{self.dtype} ({', '.join(sizes)})"


class CoverageRow(NamedTuple):
    """What became of one operator of the model.

    Attributes:
        op: the operator as PyTorch names it.
        node: its name in the graph.
        kind: "integer", "weight-only", "float", "bfloat16" or "shape".
        kernel: what computes it.
        reason: why it stayed float; "" otherwise.
        where: the module path in the user's model.
    """

    op: str
    node: str
    kind: str
    kernel: str
    reason: str = ""
    where: str = ""


def numerics(coverage: Iterable[CoverageRow]) -> str:
    """What a model computes in: "int8" if any operator does, else "weight-only" or "bfloat16", else "float32"."""
    kinds = {row.kind for row in coverage}
    named = {"integer": "int8", "weight-only": "weight-only", "bfloat16": "bfloat16"}
    return next((name for kind, name in named.items() if kind in kinds), "float32")


class PassRow(NamedTuple):
    """What one pass of the compiler did to the graph."""

    name: str
    changed: bool
    nodes_before: int
    nodes_after: int


class Variant(NamedTuple):
    """The machine code for one target.

    Attributes:
        name: the target, as the user wrote it.
        machine: "x86_64" or "aarch64".
        features: the processor features it needs (see `qcompile.device`).
        rank: of several that a device can run, the highest is best.
        library: a shared object: a Relax virtual-machine executable with the function "main".
        constants: the tensors that "main" takes after the inputs, as one tuple, in order; may be empty.
        device_code: of a variant for an NVIDIA GPU, its kernels: a fatbin or PTX, as the driver takes it; else empty.
        device_kernels: their names, parameters and launch parameters, as the JSON of TVM's kernel metadata; else "".
        alignments: on a CPU, of each input: what its address must be a multiple of, in bytes; (): 64 for all.
    """

    name: str
    machine: str
    features: tuple[str, ...]
    rank: int
    library: container.Buffer
    constants: Mapping[str, np.ndarray]
    device_code: container.Buffer = b""
    device_kernels: str = ""
    alignments: tuple[int, ...] = ()

    def __repr__(self) -> str:
        return f"Variant({self.name!r}, {len(self.library)} bytes of code)"


class Golden(NamedTuple):
    """One case of the self-test: flat inputs, and the flat outputs that they must give."""

    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]


class Artifact(NamedTuple):
    """A compiled model.

    Attributes:
        inputs, outputs: flat, in call order.
        output_structure: how the flat outputs nest: an index, {"tuple": [...]}, {"list": [...]} or
            {"dict": {name: ...}}.
        variants: one per target.
        coverage: the ledger.
        passes: what each pass did.
        toolchain: package name -> version, of what built it.
        golden: the self-test.
        tolerance: 0 where every operator is integer: outputs must match bit for bit. Where some stayed
            float, the largest |difference| allowed, as a part of the output's largest magnitude.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    output_structure: Any
    variants: tuple[Variant, ...]
    coverage: tuple[CoverageRow, ...] = ()
    passes: tuple[PassRow, ...] = ()
    toolchain: Mapping[str, str] = MappingProxyType({})
    golden: tuple[Golden, ...] = ()
    tolerance: float = 0.0

    def __repr__(self) -> str:
        return f"Artifact({self.inputs} -> {self.outputs}, {self.variants})"

    @property
    def exact(self) -> bool:
        """Whether every run, on every machine, gives the same bits."""
        return self.tolerance == 0.0

    def sizes(self) -> dict[str, int]:
        """Bytes of each member, by its name in the file."""
        return {name: len(data) for name, data in self._members().items()}

    def to_bytes(self) -> memoryview:
        """The bytes of the file; equal artifacts give equal bytes."""
        return container.encode(self._manifest(), self._members())

    def save(self, path: str | Path) -> None:
        """Write the `.qcm` file. An interrupted save leaves the old file, or none.

        Raises:
            ArtifactError: the folder does not exist or cannot be written.
        """
        try:
            container.write_atomically(os.fspath(path), self.to_bytes())
        except OSError as error:
            raise ArtifactError(
                f"the artifact cannot be saved: {error.strerror}",
                where=str(path),
                remedy="check that the folder exists, may be written and has room",
            ) from error

    @staticmethod
    def load(path: str | Path, meanwhile: Callable[[], object] | None = None) -> Artifact:
        """Read a `.qcm` file: its bytes are mapped, and all of them are checked. Loads no code.

        Args:
            meanwhile: called while most of the bytes are being checked.

        Raises:
            ArtifactError: missing, truncated, altered, from a newer format, or not an artifact.
        """
        return Artifact.from_bytes(container.map_file(os.fspath(path)), where=str(path), meanwhile=meanwhile)

    @staticmethod
    def from_bytes(
        data: container.Buffer, *, where: str = "bytes", meanwhile: Callable[[], object] | None = None
    ) -> Artifact:
        """The inverse of `to_bytes`; constants stay views into `data`. Raises ArtifactError as `load` does."""
        manifest, members = container.decode(memoryview(data), where, meanwhile)
        try:
            return _artifact(manifest, members)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise ArtifactError(
                f"the artifact's manifest is not as the format says: {error!r}",
                where=where,
                remedy="it was not written by qcompile; save it again",
            ) from error

    def _manifest(self) -> dict[str, Any]:
        return {
            "format": container.FORMAT,
            "inputs": [spec._asdict() for spec in self.inputs],
            "outputs": [spec._asdict() for spec in self.outputs],
            "output_structure": self.output_structure,
            "targets": [_target(variant) for variant in self.variants],
            "toolchain": dict(self.toolchain),
            "exact": self.exact,
            "tolerance": self.tolerance,
            "ledger": [row._asdict() for row in self.coverage],
            "passes": [row._asdict() for row in self.passes],
        }

    def _members(self) -> dict[str, container.Buffer]:
        members: dict[str, container.Buffer] = {}
        for variant in self.variants:
            members[f"targets/{variant.name}/library.so"] = variant.library
            members[f"targets/{variant.name}/constants.safetensors"] = tensors.encode(variant.constants)
            if variant.device_code:
                members[f"targets/{variant.name}/device_code"] = variant.device_code
        arrays = {
            f"{case}.{side}.{index}": array
            for case, golden in enumerate(self.golden)
            for side, flat in (("input", golden.inputs), ("output", golden.outputs))
            for index, array in enumerate(flat)
        }
        members["golden.safetensors"] = tensors.encode(arrays)
        return members


def _artifact(manifest: dict[str, Any], members: dict[str, memoryview]) -> Artifact:
    inputs = tuple(_spec(entry) for entry in manifest["inputs"])
    outputs = tuple(_spec(entry) for entry in manifest["outputs"])
    variants = tuple(
        Variant(
            name=entry["name"],
            machine=entry["machine"],
            features=tuple(entry["features"]),
            rank=int(entry["rank"]),
            library=members[f"targets/{entry['name']}/library.so"],
            constants=tensors.decode(members[f"targets/{entry['name']}/constants.safetensors"]),
            alignments=_alignments(entry, inputs),
            **_device_part(entry, members),
        )
        for entry in manifest["targets"]
    )
    arrays = tensors.decode(members["golden.safetensors"])
    cases = len({name.partition(".")[0] for name in arrays})
    golden = tuple(
        Golden(
            tuple(arrays[f"{case}.input.{i}"] for i in range(len(inputs))),
            tuple(arrays[f"{case}.output.{i}"] for i in range(len(outputs))),
        )
        for case in range(cases)
    )
    return Artifact(
        inputs=inputs,
        outputs=outputs,
        output_structure=manifest["output_structure"],
        variants=variants,
        coverage=tuple(CoverageRow(**row) for row in manifest["ledger"]),
        passes=tuple(PassRow(**row) for row in manifest["passes"]),
        toolchain=manifest["toolchain"],
        golden=golden,
        tolerance=float(manifest["tolerance"]),
    )


def _target(variant: Variant) -> dict[str, Any]:
    entry = {
        "name": variant.name,
        "machine": variant.machine,
        "features": list(variant.features),
        "rank": variant.rank,
        "alignments": list(variant.alignments),
    }
    return {**entry, "device_kernels": variant.device_kernels} if variant.device_code else entry


def _alignments(entry: dict[str, Any], inputs: tuple[TensorSpec, ...]) -> tuple[int, ...]:
    found = entry.get("alignments", [])  # before format 4 there were none
    known = isinstance(found, list) and all(type(number) is int and number in _ALIGNMENTS for number in found)
    if not known or len(found) not in (0, len(inputs)):
        raise ValueError(f"alignments of {len(inputs)} inputs that are {found}")
    return tuple(found)


def _device_part(entry: dict[str, Any], members: dict[str, memoryview]) -> dict[str, Any]:
    """What a variant for a GPU has besides."""
    if "device_kernels" not in entry:
        return {}
    if not isinstance(entry["device_kernels"], str):
        raise TypeError(f"kernels that are {entry['device_kernels']!r}")
    return {
        "device_code": members[f"targets/{entry['name']}/device_code"],
        "device_kernels": entry["device_kernels"],
    }


def _spec(entry: dict[str, Any]) -> TensorSpec:
    shape = tuple(d if isinstance(d, int) else (str(d[0]), int(d[1]), int(d[2])) for d in entry["shape"])
    if entry["dtype"] not in tensors.NAMES:
        raise ValueError(f"an input or output of dtype {entry['dtype']!r}")
    path = tuple(entry.get("path", ()))  # format 1 had none
    if not all(isinstance(key, (str, int)) for key in path):
        raise ValueError(f"an input at the path {path}")
    return TensorSpec(**{**entry, "shape": shape, "path": path})
