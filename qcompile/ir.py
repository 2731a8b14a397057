"""Program: one torch.fx graph from first to last, with its stage, its inputs and its ledger.

The graph is ATen as torch.export captures it: functional, parameters as ``get_attr``. At every
stage it runs in eager PyTorch. Every tensor-valued node carries ``meta["val"]``, a fake tensor
whose shape may hold symbols (a dynamic batch); nothing here assumes that a dimension is a number.

    float     ATen operators
    observed  float plus observer modules
    qdq       ATen between quantized_decomposed.quantize_* / dequantize_* (the PT2E convention)
    integer   torch.ops.qcompile.*: int8 in, int8 out; float only where the ledger says so
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.arith import QMAX, QMIN
from qcompile.errors import QcompileError


class Stage(Enum):
    """The four stages; a pass moves a program from one to the next, never back."""

    FLOAT = "float"
    OBSERVED = "observed"
    QDQ = "qdq"
    INTEGER = "integer"


class Property(Enum):
    """What a pass may require of a program and establish in it. Never a pass class, so passes
    do not import each other."""

    FLOAT = "float"
    CANONICAL = "canonical"
    BATCHNORM_FOLDED = "batchnorm_folded"
    OBSERVED = "observed"
    CALIBRATED = "calibrated"
    GIVEN_QDQ = "given_qdq"  # quantized before it was captured
    QDQ = "qdq"
    INTEGER = "integer"


@dataclass(frozen=True)
class QParams:
    """Affine int8 quantization of one tensor: real = scale * (q - zero_point)."""

    scale: float
    zero_point: int
    qmin: int = QMIN
    qmax: int = QMAX


QPARAMS = "qparams"  # node.meta key of an int8 node of the integer graph: its QParams


@dataclass(frozen=True)
class InputSpec:
    """One input of the model. A dimension is a number, or (symbol name, smallest, largest)."""

    name: str
    shape: tuple[int | tuple[str, int, int], ...]
    dtype: str  # "float32", "int64", ... as NumPy names them
    path: tuple[str | int, ...] = ()  # to it inside of the model's arguments, where it is not `name` itself


@dataclass(frozen=True)
class LedgerRow:
    """What became of one operator of the model."""

    op: str  # the ATen operator
    node: str  # the graph node, stable across the run
    kind: str  # "integer", "weight-only" (integer weights, exact float arithmetic), "float", "bfloat16" or "shape"
    kernel: str  # the integer operator or kernel that computes it; "" where there is none yet
    reason: str  # why it is float, or what its weights are; "" for integer and shape
    where: str = ""  # the module path in the user's model


@dataclass
class Ledger:
    """Every operator accounted for, and every rewrite that declined, with its reason."""

    rows: list[LedgerRow] = field(default_factory=list)
    declined: list[tuple[str, str, str]] = field(default_factory=list)  # (pass or rule, node, reason)

    def decline(self, rule: str, node: fx.Node, reason: str) -> None:
        """Record why `rule` did not fire at `node` (once)."""
        entry = (rule, node.name, reason)
        if entry not in self.declined:
            self.declined.append(entry)


@dataclass
class Program:
    """A model on its way from float to int8.

    Attributes:
        graph_module: what a pass rewrites.
        stage: which operators are legal now (see `qcompile.verify`).
        properties: what earlier passes established.
        inputs: one spec per placeholder, in order.
        output_structure: how the flat outputs nest: an index, {"tuple": [...]}, {"list": [...]} or
            {"dict": {name: ...}}.
        ledger: what became of each operator.
    """

    graph_module: fx.GraphModule
    stage: Stage
    inputs: tuple[InputSpec, ...]
    output_structure: Any = 0
    properties: set[Property] = field(default_factory=set)
    ledger: Ledger = field(default_factory=Ledger)

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def outputs(self) -> list[fx.Node]:
        """The flat list of output nodes."""
        (out,) = (n for n in self.graph.nodes if n.op == "output")
        args = out.args[0]
        return list(args) if isinstance(args, (tuple, list)) else [args]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph eagerly; returns the flat outputs."""
        with torch.no_grad():
            result = self.graph_module(*inputs)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)


# --- reading nodes -------------------------------------------------------------------------------


def where(node: fx.Node) -> str:
    """The module path of `node` in the user's model, for example "layer1.0.conv1"; "" at the root."""
    stack = node.meta.get("nn_module_stack")
    path = list(stack.values())[-1][0] if stack else ""
    # Export prefixes paths with the name of its own root ("L['self'].layer1" or "self.layer1").
    for prefix in ("L['self']", "self"):
        path = path.removeprefix(prefix)
    path = str(path).lstrip(".")
    return "" if path.startswith("_empty_nn_module_stack") else path  # export's own nodes have no module


_NOT_THE_USERS = ("/torch/nn/", "/torch/_", '"<eval_with_key>')  # in the file of a stack frame


def source(node: fx.Node) -> str | None:
    """The innermost line of the user's forward that made `node`, or None."""
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    frames = [i for i, line in enumerate(trace) if line.startswith("File ")]
    user = [i for i in frames if not any(part in trace[i] for part in _NOT_THE_USERS)]
    if not user:
        return None
    at = user[-1]
    code = trace[at + 1] if at + 1 < len(trace) and not trace[at + 1].startswith("File ") else ""
    return f"{trace[at].removeprefix('File ')}: {code}".replace('"', "")


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def is_constant(node: fx.Node) -> bool:
    return node.op == "get_attr"


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a tensor node: ints, and torch.SymInt where a dimension is dynamic."""
    return tuple(node.meta["val"].shape)


def constant(graph_module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor behind a get_attr node (detached)."""
    value: Any = graph_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach()


MOMENTS = "moments"  # node.meta key of a layer: the mean and deviation of each channel that it makes (see `Moments`)
ORIGIN = "origin"  # node.meta key of a constant, and of a dequantized weight


@dataclass(frozen=True)
class Moments:
    """Of each channel, as training left them: those of a batch norm that was folded into the layer.

    Attributes:
        mean, deviation: (channels,) float64.
    """

    mean: Tensor
    deviation: Tensor

    def scaled(self, factors: Tensor) -> Moments:
        """Of the channels times `factors` (channels,), which are positive."""
        return Moments(self.mean * factors, self.deviation * factors)


@dataclass(frozen=True)
class Origin:
    """The parameter of the user's model that a constant holds, or is made of.

    Attributes:
        path: "layer1.0.conv1.weight".
        trainable: whether the user lets training change it (`requires_grad`).
    """

    path: str
    trainable: bool

    def sibling(self, leaf: str) -> Origin:
        """Another parameter of the same module."""
        module = self.path.rpartition(".")[0]
        return Origin(f"{module}.{leaf}" if module else leaf, self.trainable)


def origin(*nodes: fx.Node | None) -> Origin | None:
    """Of a constant made of `nodes`: the path of the first parameter among them, trainable if one of them is."""
    found = [node.meta[ORIGIN] for node in nodes if node is not None and ORIGIN in node.meta]
    return Origin(found[0].path, any(o.trainable for o in found)) if found else None


# --- building nodes ------------------------------------------------------------------------------


def add_constant(graph_module: fx.GraphModule, name: str, value: Tensor, origin: Origin | None = None) -> fx.Node:
    """Register `value` as a buffer under a fresh name and return its get_attr node.

    The caller holds the insertion point (``graph.inserting_before``), and says of which parameter the value is made.
    """
    base = name.replace(".", "_")
    fresh, i = base, 0
    while hasattr(graph_module, fresh):
        i += 1
        fresh = f"{base}_{i}"
    graph_module.register_buffer(fresh, value.detach().clone().contiguous())
    node = graph_module.graph.get_attr(fresh)
    mode = fake_mode(graph_module)
    node.meta["val"] = mode.from_tensor(getattr(graph_module, fresh), static_shapes=True)
    if origin is not None:
        node.meta[ORIGIN] = origin
    return node


def copy_meta(new: fx.Node, old: fx.Node) -> fx.Node:
    """Give `new` the origin (module path, source line) of `old`."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    return new


def fake_mode(graph_module: fx.GraphModule) -> FakeTensorMode:
    """The fake-tensor mode that the graph's placeholders were captured in."""
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
            return node.meta["val"].fake_mode
    return FakeTensorMode()


class NodeFailure(Exception):
    """Something raised, at a node that is known; what it was is the cause. The manager turns it into a PassError."""

    def __init__(self, node: fx.Node, cause: Exception) -> None:
        super().__init__(f"{type(cause).__name__}: {cause}")
        self.node = node


@contextmanager
def blaming(node: fx.Node) -> Iterator[None]:
    """Within, whatever raises has failed at `node`."""
    try:
        yield
    except (NodeFailure, QcompileError):
        raise
    except Exception as error:
        raise NodeFailure(node, error) from error


class _Shapes(fx.Interpreter):
    """Runs the graph on fake tensors and records each node's value in its meta."""

    def __init__(self, graph_module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(graph_module)
        self.mode = mode
        self.extra_traceback = False  # it would add the node to the error's text

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        with blaming(n):
            result = super().run_node(n)
        if n.op != "output":
            n.meta["val"] = result
        return result


def propagate(program: Program) -> None:
    """Recompute ``meta["val"]`` of every node from the placeholders' own."""
    mode = fake_mode(program.graph_module)
    # Without the Python dispatcher some ATen kernels (constant_pad_nd) ask for a size as a number,
    # which would pin a dynamic dimension to the example's.
    with mode, enable_python_dispatcher(), torch.no_grad():
        _Shapes(program.graph_module, mode).run(*[p.meta["val"] for p in program.placeholders()])


def finish(program: Program) -> None:
    """After a rewrite: drop dead nodes and unused constants, check, recompile, recompute shapes."""
    graph_module = program.graph_module
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    graph_module.delete_all_unused_submodules()
    used = {str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr"}
    for name in [*dict(graph_module.named_buffers(recurse=False)), *dict(graph_module.named_parameters(recurse=False))]:
        if name not in used:
            delattr(graph_module, name)
    propagate(program)


def call_nodes(graph: fx.Graph, targets: Iterable[Callable[..., Any]]) -> Iterator[fx.Node]:
    """The call_function nodes of `graph` with one of `targets`, in order (safe while rewriting)."""
    wanted = set(targets)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in wanted:
            yield node
