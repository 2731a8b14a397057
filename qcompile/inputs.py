"""How a model's inputs and outputs nest: flattening them to the graph's order, and describing both.

A batch is a tensor (one input), a tuple or list (positional inputs) or a dict (keyword inputs).
Nested containers flatten as torch.export flattens them.

What a batch of data holds beyond the model's inputs (a DataLoader's labels) is left out, with a warning:
positional values behind the last input, and keys that are no input. The inputs are those of
`example_inputs`; without these, of the first batch, which must then not leave open whether a value is an
optional input or a label.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from qcompile.checks import Placed, arguments, by_path, in_order
from qcompile.errors import CalibrationError, CalibrationWarning, CaptureError, InputError
from qcompile.ir import InputSpec

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
UNBOUNDED = 2**31 - 1  # the largest size of a dynamic dimension that has no bound of its own


def is_empty(inputs: Any) -> bool:
    """Whether there is no input in `inputs` at all."""
    return inputs is None or (isinstance(inputs, (tuple, list, Mapping)) and len(inputs) == 0)


def example_call(model: nn.Module, inputs: Any, dynamic_shapes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of an example call of `model`.

    Raises:
        CalibrationError: a float input is not float32.
        CaptureError: `dynamic_shapes` is of no form that torch.export takes, or names an axis that an input has not.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    inputs = pytree.tree_map_only(np.ndarray, torch.from_numpy, inputs)
    _check_types(inputs)
    if isinstance(inputs, Mapping):
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        args: tuple[Any, ...] = ()
        # In the order of the signature, which is then the order of the graph's inputs.
        kwargs = {p.name: inputs[p.name] for p in parameters if p.name in inputs}
        kwargs |= {k: v for k, v in inputs.items() if takes_any and k not in kwargs}
    else:
        args, kwargs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}
        if not any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
            args = args[: sum(p.kind in _POSITIONAL for p in parameters)]
    names_in_order = [p.name for p in parameters if p.kind in _POSITIONAL][: len(args)]
    specs = _specs_by_name(dynamic_shapes, names_in_order)
    for name, value in (*zip(names_in_order, args, strict=False), *kwargs.items()):
        _check_axes(value, specs.get(name), name)
    grown = {name: _grow(value, specs.get(name)) for name, value in zip(names_in_order, args, strict=False)}
    return (
        (*grown.values(), *args[len(grown) :]),
        {name: _grow(value, specs.get(name)) for name, value in kwargs.items()},
    )


def check_first_batch(model: nn.Module, batch: Any) -> None:
    """Refuse a batch to take example inputs from that may hold an optional input as well as a label.

    Raises:
        CalibrationError
    """
    if not isinstance(batch, (tuple, list)):
        return
    takes = [p for p in inspect.signature(model.forward).parameters.values() if p.kind in _POSITIONAL]
    needs = max(1, sum(p.default is p.empty for p in takes))
    if needs < min(len(batch), len(takes)):
        raise CalibrationError(
            f"the batch holds {len(batch)} values, and the model needs {needs} and can take {len(takes)}",
            where="calibration batch 0",
            remedy="say which are inputs: pass example_inputs, or batches that are dicts by the names of the inputs",
        )


def _check_types(inputs: Any) -> None:
    """Refuse float inputs of another width before the model meets them: its own error would be about weights."""
    named = inputs if isinstance(inputs, Mapping) else dict(enumerate(pytree.tree_leaves(inputs)))
    for name, value in named.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype is not torch.float32:
            raise CalibrationError(
                f"the example input {name!r} is {value.dtype}",
                remedy="pass float32 inputs, and a model that takes them: x.float(), model.float()",
            )


def _specs_by_name(dynamic_shapes: Any, names: list[str]) -> dict[str, Any]:
    if isinstance(dynamic_shapes, Mapping):
        return dict(dynamic_shapes)
    if isinstance(dynamic_shapes, (tuple, list)):
        return dict(zip(names, dynamic_shapes, strict=False))
    if dynamic_shapes is None:
        return {}
    raise CaptureError(
        f"dynamic_shapes is a {type(dynamic_shapes).__name__}",
        remedy='give one entry per input: ({0: torch.export.Dim("batch")},), or a dict by the names of the inputs',
    )


def _check_axes(value: Any, spec: Any, name: str) -> None:
    """Refuse a dynamic axis that the input `name` has not: torch.export would fail inside of itself."""
    if isinstance(value, Tensor) and isinstance(spec, Mapping):
        for axis in spec:
            if axis not in range(value.dim()):
                raise CaptureError(
                    f"dynamic_shapes names the axis {axis!r} of the input {name!r} of shape {tuple(value.shape)}",
                    remedy=f"name its axes by the numbers 0 to {value.dim() - 1}",
                )
    elif isinstance(value, Mapping) and isinstance(spec, Mapping):
        for key in value:
            _check_axes(value[key], spec.get(key), f"{name}.{key}")
    elif isinstance(value, (tuple, list)) and isinstance(spec, (tuple, list)):
        for i, (inner, its) in enumerate(zip(value, spec, strict=False)):
            _check_axes(inner, its, f"{name}.{i}")


def _axes(spec: Any) -> dict[int, Any]:
    """axis -> Dim of one tensor's dynamic shape."""
    if isinstance(spec, Mapping):
        return {axis: dim for axis, dim in spec.items() if isinstance(axis, int) and dim is not None}
    if isinstance(spec, (tuple, list)):
        return {axis: dim for axis, dim in enumerate(spec) if dim is not None and not isinstance(dim, int)}
    return {}


def _grow(value: Any, spec: Any) -> Any:
    """Repeat an example of size 1 along its dynamic dimensions: torch.export would take 1 for a constant."""
    if not isinstance(value, Tensor):
        return value
    repeats = [2 if axis in _axes(spec) and size == 1 else 1 for axis, size in enumerate(value.shape)]
    return value.repeat(repeats) if 2 in repeats else value


def input_specs(exported: ExportedProgram, graph_module: fx.GraphModule, dynamic_shapes: Any) -> tuple[InputSpec, ...]:
    """One spec per placeholder. A dynamic dimension has the name of the user's Dim, where it has one."""
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    user = _specs_by_name(dynamic_shapes, [str(n.target) for n in placeholders])
    names: dict[str, str] = {}
    for node in placeholders:
        for axis, dim in _axes(user.get(str(node.target))).items():
            size = node.meta["val"].shape[axis]
            if isinstance(size, torch.SymInt):
                names.setdefault(str(size), getattr(dim, "__name__", str(size)))
    paths = _paths(exported)
    return tuple(_spec(exported, node, names, paths.get(node.name, ())) for node in placeholders)


def _paths(exported: ExportedProgram) -> dict[str, tuple[str | int, ...]]:
    """Placeholder -> the argument of the model that it is in, then keys and positions there; not of whole arguments."""
    signature: Any = exported.module_call_graph[0].signature
    arguments = signature.forward_arg_names or ()
    tree = pytree.tree_unflatten([0] * signature.in_spec.num_leaves, signature.in_spec)
    leaves, _ = pytree.tree_flatten_with_path(tree)  # of (positional, keyword) arguments
    names = [s.arg.name for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    paths: dict[str, tuple[str | int, ...]] = {}
    for name, (path, _) in zip(names, leaves, strict=True):
        kind, argument, *keys = (_key(entry) for entry in path)
        root = argument if kind == 1 else arguments[argument] if arguments else name
        paths[name] = (root, *keys)
    return {name: path for name, path in paths.items() if path != (name,)}


def _key(entry: Any) -> Any:
    """Of an entry of pytree's path: a position, a key or an attribute."""
    (field,) = dataclasses.fields(entry)
    return getattr(entry, field.name)


def _spec(exported: ExportedProgram, node: fx.Node, names: dict[str, str], path: tuple[str | int, ...]) -> InputSpec:
    value: Tensor = node.meta["val"]
    if value.is_floating_point() and value.dtype is not torch.float32:
        raise CaptureError(f"the input {node.name!r} is {value.dtype}", remedy="pass float32 example inputs")
    shape: list[int | tuple[str, int, int]] = []
    for size in value.shape:
        if isinstance(size, int):
            shape.append(size)
            continue
        symbol = size.node.expr
        if not symbol.is_symbol:
            raise CaptureError(
                f"a dimension of the input {node.name!r} is {symbol}",
                remedy="give each dynamic dimension a Dim of its own, or the same Dim where sizes are equal",
            )
        bounds = exported.range_constraints[symbol]
        high = int(min(bounds.upper, UNBOUNDED))  # it may be infinite
        name = names.get(str(size), str(size))
        # Where the user named no bounds (Dim.AUTO), torch says 2, because it treats 0 and 1 apart.
        low = 1 if name == str(size) and bounds.lower <= 2 else max(1, int(bounds.lower))
        shape.append((name, low, high))
    if not all(isinstance(key, (str, int)) for key in path):
        raise CaptureError(
            f"the input {node.name!r} is in a dict with a key that is no text and no whole number: {path}",
            remedy="use such keys, so that an artifact can name them",
        )
    return InputSpec(str(node.target), tuple(shape), str(value.dtype).removeprefix("torch."), path)


def output_structure(exported: ExportedProgram) -> Any:
    """How the flat outputs nest: see `Program.output_structure`. None stands for an output that is None."""
    out_spec: Any = exported.module_call_graph[0].signature.out_spec
    (output,) = (n for n in exported.graph.nodes if n.op == "output")
    count = iter(range(len(output.args[0])))
    flat = [None if value is None else _Leaf(next(count)) for value in output.args[0]]
    return _structure(pytree.tree_unflatten(flat, out_spec))


@dataclasses.dataclass(frozen=True)
class _Leaf:
    index: int


def _structure(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, _Leaf):
        return value.index
    if isinstance(value, Mapping):
        return {"dict": {str(k): _structure(v) for k, v in value.items() if v is not None}}
    if hasattr(value, "_asdict"):
        return {"dict": {k: _structure(v) for k, v in value._asdict().items()}}
    if dataclasses.is_dataclass(value):
        return {"dict": {f.name: _structure(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    kind = "list" if isinstance(value, list) else "tuple"
    return {kind: [_structure(v) for v in value]}


def flatten(batch: Any, specs: Sequence[Placed]) -> list[Any] | None:
    """The inputs `specs` that `batch` holds; None when it holds too few."""
    names = arguments(specs)
    try:
        if isinstance(batch, Mapping):
            return by_path(specs, (), {name: value for name, value in batch.items() if name in names})
        nests = any(spec.path for spec in specs) and isinstance(batch, (tuple, list))
        if nests and any(isinstance(value, (Mapping, tuple, list)) for value in batch):
            return by_path(specs, batch[: len(names)], {})
    except InputError:
        return None
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if leaf is not None]
    return leaves[: len(specs)] if len(leaves) >= len(specs) else None


def count_samples(inputs: Sequence[Tensor]) -> int:
    """How many samples the flat inputs of a call hold."""
    return len(inputs[0]) if inputs and inputs[0].dim() else 1


def surplus(batch: Any, specs: Sequence[Placed]) -> str:
    """What `flatten` leaves out of `batch`, in words; "" for nothing."""
    if isinstance(batch, Mapping):
        return ", ".join(str(key) for key in batch if key not in arguments(specs))
    count = sum(leaf is not None for leaf in pytree.tree_leaves(batch)) - len(specs)
    return f"the last {count} values" if count > 1 else "the last value" if count == 1 else ""


def warn_of_surplus(batch: Any, specs: Sequence[Placed]) -> None:
    """Say what `flatten` leaves out of `batch`; Python shows equal warnings once."""
    if left_out := surplus(batch, specs):
        warnings.warn(
            f"the data holds more than the model's inputs ({', '.join(arguments(specs))}); left out of each batch, as "
            f"labels: {left_out}",
            CalibrationWarning,
            stacklevel=3,
        )


def arrange(args: tuple[Any, ...], kwargs: Mapping[str, Any], specs: Sequence[InputSpec]) -> Sequence[Tensor]:
    """The inputs `specs` of a call of the model.

    Raises:
        InputError: an input is missing, is no tensor, or is none of the model's.
    """
    flat = in_order(specs, args, kwargs)
    if len(flat) != len(specs) or not all(isinstance(v, Tensor) for v in flat):
        names = ", ".join(spec.name for spec in specs)
        raise InputError(f"the model takes {len(specs)} tensors: {names}", remedy="pass them all, and no more")
    return flat


def unflatten(structure: Any, flat: Any) -> Any:
    """The flat outputs nested as `Program.output_structure` says."""
    if structure is None or isinstance(structure, int):
        return None if structure is None else flat[structure]
    ((kind, inner),) = structure.items()
    if kind == "dict":
        return {name: unflatten(value, flat) for name, value in inner.items()}
    values = [unflatten(value, flat) for value in inner]
    return values if kind == "list" else tuple(values)
