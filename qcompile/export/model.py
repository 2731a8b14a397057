"""export_onnx(): an integer program as an ONNX model that any engine with QDQ support runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from qcompile.container import write_atomically
from qcompile.errors import ExportError
from qcompile.ir import Program, Stage

if TYPE_CHECKING:
    from onnx import ModelProto

    from qcompile.compiled import CompiledModel
    from qcompile.export.writer import Activations
    from qcompile.quantizer import QuantizedModel


def export_onnx(model: QuantizedModel | CompiledModel, path: str | Path, *, activations: Activations = "int8") -> None:
    """Write `model` to `path` (.onnx), checked by ONNX's own checker; an interrupted write leaves the old file.

    Inputs have the model's names, outputs are called output0, output1, ... in order; dynamic dimensions stay so.

    Args:
        model: what `qcompile.quantize` or `qcompile.compile` returned.
        activations: "int8", or "uint8" with every zero point 128 higher: the same values, and the type that ONNX
            Runtime is fastest with on x86.

    Raises:
        ExportError: an operator has no counterpart (names it), `path` does not end in .onnx or cannot be written,
            `model` is no such model, `activations` is another type, or the package onnx is missing.
    """
    where = Path(path)
    if where.suffix != ".onnx":
        raise ExportError("the file would not be called .onnx", where=str(path), remedy=f"call it {where.stem}.onnx")
    try:
        write_atomically(os.fspath(where), memoryview(to_onnx(model, activations=activations).SerializeToString()))
    except OSError as error:
        raise ExportError(
            f"the ONNX model cannot be saved: {error.strerror}",
            where=str(path),
            remedy="check that the folder exists, may be written and has room",
        ) from error


def to_onnx(model: QuantizedModel | CompiledModel, *, activations: Activations = "int8") -> ModelProto:
    """The ONNX model in memory. Arguments and errors as in `export_onnx`."""
    if activations not in ("int8", "uint8"):
        raise ExportError(f"activations is {activations!r}", where="activations", remedy="use 'int8' or 'uint8'")
    program = getattr(model, "program", None)
    if not isinstance(program, Program) or program.stage is not Stage.INTEGER:
        raise ExportError(
            f"a {type(model).__name__} has no integer program",
            remedy="pass what qcompile.quantize or qcompile.compile returned; a .qcm file holds machine code only",
        )
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ExportError("the package onnx is missing", remedy="pip install 'qcompile[onnx]'") from error
    from qcompile.export.graph import write

    return write(program, activations)
