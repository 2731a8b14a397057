"""Inputs of a call, held to the model's specification before any kernel sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qcompile.artifact import TensorSpec
from qcompile.errors import InputError


def in_order(specs: Sequence[TensorSpec], inputs: Sequence[Any], named: Mapping[str, Any]) -> Sequence[Any]:
    """Positional and keyword inputs in the order of `specs`; lists and tuples are taken apart.

    Raises:
        InputError: a keyword is no input of the model, or is given twice.
    """
    for value in inputs:  # not any(...), which costs as much as all other checks
        if isinstance(value, (list, tuple)):
            inputs = list(_leaves(inputs))
            break
    if not named:
        return inputs
    wanted = [spec.name for spec in specs[len(inputs) :]]
    if set(named) != set(wanted):
        raise InputError(
            f"the keyword inputs are {', '.join(named)}, and the model takes {', '.join(wanted) or 'no more'}",
            remedy="give every input once, by position or by its name",
        )
    return [*inputs, *(named[name] for name in wanted)]


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


class InputChecker:
    """Checks count, shape and dtype; a dynamic dimension against its bounds and its other uses."""

    def __init__(self, specs: tuple[TensorSpec, ...]) -> None:
        self._specs = specs
        self._expected = [(spec.shape, np.dtype(spec.dtype)) for spec in specs]
        self._static = all(isinstance(size, int) for spec in specs for size in spec.shape)

    def __call__(self, inputs: Sequence[Any]) -> list[np.ndarray]:
        """The inputs as arrays.

        Raises:
            InputError: names the input and says what was expected.
        """
        arrays = [x if isinstance(x, np.ndarray) else np.asarray(x) for x in inputs]
        if not self._static or [(x.shape, x.dtype) for x in arrays] != self._expected:
            self._check(arrays)
        return arrays

    def _check(self, arrays: Sequence[np.ndarray]) -> None:
        if len(arrays) != len(self._specs):
            wanted = ", ".join(f"{spec.name}: {spec.text}" for spec in self._specs)
            raise InputError(
                f"the model takes {len(self._specs)} inputs, and {len(arrays)} were given",
                remedy=f"give {wanted or 'none'}",
            )
        sizes: dict[str, tuple[int, str]] = {}
        for array, spec, (shape, dtype) in zip(arrays, self._specs, self._expected, strict=True):
            if array.dtype != dtype:
                raise InputError(
                    f"input {spec.name!r} has dtype {array.dtype}, and the model takes {spec.dtype}",
                    where=f"input {spec.name}",
                    remedy=f"convert it to {spec.dtype}",
                )
            if array.ndim != len(shape):
                raise _wrong_shape(array, spec, "")
            for axis, (size, wanted_size) in enumerate(zip(array.shape, shape, strict=True)):
                if isinstance(wanted_size, int):
                    if size != wanted_size:
                        raise _wrong_shape(array, spec, "")
                    continue
                symbol, smallest, largest = wanted_size
                if not smallest <= size <= largest:
                    raise _wrong_shape(array, spec, f": dimension {axis} ({symbol}) is out of bounds")
                known, first = sizes.setdefault(symbol, (size, spec.name))
                if known != size:
                    raise _wrong_shape(array, spec, f": {symbol} is {size} here and {known} in input {first!r}")


def _wrong_shape(array: np.ndarray, spec: TensorSpec, detail: str) -> InputError:
    return InputError(
        f"input {spec.name!r} has shape {array.shape}, and the model takes {spec.text}{detail}",
        where=f"input {spec.name}",
        remedy="give an input of that shape, or compile the model with dynamic_shapes",
    )
