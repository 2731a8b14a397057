"""What the command line reads: a model that torch.export.save wrote, and arrays that numpy.savez wrote.

The arrays of a file are the model's inputs, and nothing else: by their names, or where these are not the model's,
in the order of the file.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from qcompile.errors import CalibrationError, InputError, QcompileError


def read_model(model: Path, batch: int | None, *data: Path | None) -> tuple[Any, ...]:
    """The exported program, and the batches that each file of `data` holds, None for none."""
    from qcompile.exported import example_batch, load_exported

    program = load_exported(model)
    names = list(program.graph_signature.user_inputs)
    size = batch or example_batch(program)
    return program, *(path and _batches(read_arrays(path, CalibrationError), size, names, path) for path in data)


def read_data(program: Any, path: Path, batch: int | None, labels: str | None) -> list[Any]:
    """The batches of an .npz file to evaluate an exported program on; pairs with the array `labels`, where given."""
    import torch

    from qcompile.exported import example_batch

    samples = read_arrays(path, InputError)
    if labels is not None and labels not in samples:
        raise InputError(
            f"there is no array {labels!r}", where=str(path), remedy=f"it holds {', '.join(samples) or 'nothing'}"
        )
    wanted = None if labels is None else samples.pop(labels)
    size, names = batch or example_batch(program), list(program.graph_signature.user_inputs)
    batches = _batches(samples, size, names, path)
    if wanted is None:
        return batches
    total = sum(len(inputs[0]) for inputs in batches)
    if wanted.ndim == 0 or len(wanted) != total:
        raise InputError(
            f"the labels have shape {wanted.shape}, for {total} samples",
            where=str(path),
            remedy="give one label per sample, along the first axis",
        )
    parts = [torch.from_numpy(wanted[start : start + size]) for start in range(0, total, size)]
    return list(zip(batches, parts, strict=True))


def read_arrays(path: Path, kind: type[QcompileError]) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; raises `kind`."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it holds one bare array")
        with loaded as file:
            arrays = {name: file[name] for name in file.files}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError("it holds something other than arrays")
            return arrays
    except (OSError, ValueError, EOFError, AttributeError, KeyError, BadZipFile, zlib.error) as error:
        raise kind(
            f"the arrays cannot be read: {error}", where=str(path), remedy="give a file that numpy.savez wrote"
        ) from error


def _batches(samples: dict[str, np.ndarray], size: int, names: Sequence[str], path: Path) -> list[tuple[Any, ...]]:
    """Slices of `size` samples of each array, as torch tensors in the order of the inputs `names`."""
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
    tensors = [torch.from_numpy(array) for array in in_order(samples, names, path)]
    return [tuple(t[start : start + size] for t in tensors) for start in range(0, total, size)]


def in_order(arrays: dict[str, np.ndarray], names: Sequence[str], path: Path) -> list[np.ndarray]:
    """The model's inputs `names`, of the arrays of a file.

    Raises:
        InputError: there are more or fewer arrays than inputs.
    """
    if len(arrays) != len(names):
        raise InputError(
            f"the file holds {', '.join(arrays) or 'nothing'}, and the model takes {', '.join(names)}",
            where=str(path),
            remedy="store one array for each input, and no other (but the labels that --labels names)",
        )
    return [arrays[name] for name in names] if set(names) == set(arrays) else list(arrays.values())
