"""Inputs of a call, held to the model's specification before any kernel sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from qcompile.artifact import TensorSpec
from qcompile.errors import ConfigError, InputError


class Placed(Protocol):
    """Where an input comes from: the argument `name`, or a path of an argument, then keys and positions in it."""

    @property
    def name(self) -> str: ...

    @property
    def path(self) -> tuple[str | int, ...]: ...


class Shaped(Protocol):
    """What of an array is checked."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def ndim(self) -> int: ...


def in_order(specs: Sequence[Placed], inputs: Sequence[Any], named: Mapping[str, Any]) -> Sequence[Any]:
    """The inputs `specs` of a call: its arguments nest as the model's do, or are the inputs in order.

    Raises:
        InputError: a keyword is no argument of the model, or is given twice; an argument nests in another way.
    """
    for value in inputs:  # not any(...), which costs as much as all other checks
        if isinstance(value, (list, tuple, dict)):
            leaves = list(_leaves(inputs, (list, tuple)))
            if any(isinstance(leaf, dict) for leaf in leaves) or (named and any(spec.path for spec in specs)):
                return by_path(specs, inputs, named)
            inputs = leaves
            break
    return by_path(specs, inputs, named) if named else inputs


def arguments(specs: Sequence[Placed]) -> list[str]:
    """The model's arguments in which the inputs `specs` are, in order."""
    return list(dict.fromkeys(str(spec.path[0]) if spec.path else spec.name for spec in specs))


def by_path(specs: Sequence[Placed], inputs: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
    """The inputs `specs`, each at its path in the arguments. Raises InputError as `in_order` does."""
    paths = [spec.path or (spec.name,) for spec in specs]
    names = arguments(specs)
    wanted = names[len(inputs) :]
    if set(named) != set(wanted) or len(inputs) > len(names):
        raise InputError(
            f"the keyword inputs are {', '.join(named) or 'none'}, and the model takes "
            f"{', '.join(wanted) or 'no more'} behind the {len(inputs)} by position",
            remedy="give every input once, by position or by its name",
        )
    values: dict[str, Any] = dict(zip(names, inputs, strict=False)) | dict(named)
    found = []
    for spec, path in zip(specs, paths, strict=True):
        value: Any = values
        try:
            for key in path:
                value = getattr(value, key) if isinstance(key, str) and isinstance(value, tuple) else value[key]
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(
                f"the input {path[0]} holds nothing at {' '.join(map(repr, path[1:]))}",
                where=f"input {spec.name}",
                remedy="give inputs that nest as those which the model was compiled with",
            ) from error
        found.append(value)
    held = sum(hasattr(leaf, "shape") for leaf in _leaves(values.values(), (list, tuple, dict)))
    if held > len(specs):
        raise InputError(
            f"the inputs hold {held} arrays, and the model takes {len(specs)}: {', '.join(s.name for s in specs)}",
            remedy="give inputs that nest as those which the model was compiled with",
        )
    return found


def _leaves(values: Iterable[Any], containers: tuple[type, ...]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, containers):
            inner: Any = value.values() if isinstance(value, dict) else value
            yield from _leaves(inner, containers)
        else:
            yield value


def check_seconds(seconds: Any) -> None:
    """Refuse a time to measure for that is none. Raises ConfigError."""
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float, np.number)) or not 0 < seconds < np.inf:
        raise ConfigError(
            f"seconds is {seconds!r}", where="seconds", remedy="give how long to measure: a number above 0"
        )


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
        self.require(arrays)
        return arrays

    def require(self, arrays: Sequence[Shaped]) -> None:
        """Raises InputError as a call does."""
        if not self._static or [(x.shape, x.dtype) for x in arrays] != self._expected:
            self._check(arrays)

    def _check(self, arrays: Sequence[Shaped]) -> None:
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


def _wrong_shape(array: Shaped, spec: TensorSpec, detail: str) -> InputError:
    return InputError(
        f"input {spec.name!r} has shape {array.shape}, and the model takes {spec.text}{detail}",
        where=f"input {spec.name}",
        remedy="give an input of that shape, or compile the model with dynamic_shapes",
    )
