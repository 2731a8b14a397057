"""Read a .pt2 file, with as little trust as torch.export.load allows.

It uses pickle for some contents. Here those are held to tensors (torch.load's weights_only), and a file
that lists other pickled objects is refused. Still, a model is a program: compile only what you trust.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators of quantized models
from torch import Tensor
from torch.export import ExportedProgram

from qcompile.errors import CaptureError

_PICKLED = ("custom_obj", "opaque_obj")  # how the archive names objects that are no tensors
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def _only_tensors() -> Iterator[None]:
    """Within, torch.load unpickles tensors and nothing else, whatever its caller says."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def load_exported(path: Path) -> ExportedProgram:
    """The program that torch.export.save wrote to `path`.

    Raises:
        CaptureError: it cannot be read, or holds pickled objects.
    """
    remedy = "write it with torch.export.save(torch.export.export(model, inputs), path)"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise CaptureError(f"the model cannot be read: {error}", where=str(path), remedy=remedy) from error
    foreign = [name for name in names if any(part.startswith(_PICKLED) for part in name.split("/"))]
    if foreign:
        raise CaptureError(
            f"the model holds pickled objects ({', '.join(foreign)}), which could run any code",
            where=str(path),
            remedy="export it without custom objects, or call qcompile.compile from Python on a file that you trust",
        )
    try:
        with _only_tensors(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch warns of its own internals here
            return torch.export.load(path)
    except Exception as error:  # whatever torch says of a file that it cannot read
        raise CaptureError(f"torch.export.load refuses the model: {error}", where=str(path), remedy=remedy) from error


def example_batch(program: ExportedProgram) -> int:
    """How many samples the program's own example inputs hold, 1 where it has none."""
    args, kwargs = program.example_inputs or ((), {})
    shapes = [x.shape for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    return shapes[0][0] if shapes and shapes[0] else 1
