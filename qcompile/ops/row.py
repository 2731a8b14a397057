"""What one row of the op table holds.

A row is all that the toolkit knows about one integer operator: the ATen operators it replaces,
how its arguments are quantized, how the integer node is built from a quantized site, the reference
(registered as ``torch.ops.qcompile.<name>``, so the integer graph runs eagerly), shape inference,
and samples that the tests sweep on every target. Everything else is derived from the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile.arith import QMAX, QMIN
from qcompile.ir import QParams, is_constant, is_tensor

LIBRARY = torch.library.Library("qcompile", "DEF")


class Output(Enum):
    """Where an operator's output scale comes from."""

    OBSERVED = "observed"  # measured by its own observer
    SHARED = "shared"  # the first operand's: the operator only moves or selects values


@dataclass(frozen=True)
class QValue:
    """An int8 node together with its quantization."""

    node: fx.Node
    qparams: QParams


@dataclass(frozen=True)
class Weight:
    """A per-output-channel symmetric int8 weight: real = scale[c] * q."""

    q: Tensor  # int8, (out_channels, ...)
    scale: Tensor  # float32, (out_channels,)


@dataclass(frozen=True)
class Site:
    """One place in a qdq graph where a row applies, as `Row.fuse` sees it."""

    node: fx.Node  # the ATen node
    inputs: tuple[QValue, ...]  # its activation operands, in the order of `Row.operands`
    output: QParams
    lo: int  # the clamp that a fused activation leaves, in quantized units
    hi: int
    weight: Weight | None
    bias: Tensor | None  # float32, (out_channels,)
    residual: QValue | None
    constant: Callable[[str, Tensor], fx.Node]  # registers a constant, returns its get_attr node


@dataclass(frozen=True)
class Act:
    """Marks a run-time activation among a sample's arguments (the rest are constants)."""

    tensor: Tensor


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of the integer operator; activations are wrapped in `Act`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True)
class Example:
    """A float module whose capture holds the row's ATen operator, and inputs for it."""

    module: nn.Module
    inputs: tuple[Tensor, ...]


def activations(node: fx.Node) -> tuple[fx.Node, ...]:
    """The default operands: every tensor input that is not a constant, in argument order."""
    return tuple(n for n in node.all_input_nodes if is_tensor(n) and not is_constant(n))


def no_examples(g: torch.Generator) -> Iterable[Example]:
    """Of a row that takes no ATen operator."""
    return ()


def no_objection(node: fx.Node) -> str | None:
    return None


Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # target, args, kwargs of the integer node


@dataclass(frozen=True)
class Row:
    """One integer operator.

    Attributes:
        name: the integer operator, ``torch.ops.qcompile.<name>``.
        schema: its torch.library schema without the name; None for a shape row, which keeps its
            ATen operator and applies it to int8.
        aten: the ATen overloads it replaces.
        reference: the definition: integer PyTorch, exact.
        fake: the output of a call on fake tensors (shape inference).
        fuse: builds the integer call from a quantized site.
        decline: why this row cannot take an ATen node that it names, or None when it can.
        operands: the activation operands of an ATen node.
        output: where the output scale comes from.
        weight_arg, bias_arg: argument positions of constant weight and bias, where it has them.
        absorbs_clamp: a following relu, relu6 or hardtanh becomes `lo` and `hi`.
        absorbs_residual: a following add of another activation joins the epilogue.
        samples: integer calls, odd shapes among them, for the bit-for-bit tests.
        examples: float modules, for the tests against float.
    """

    name: str
    schema: str | None
    aten: tuple[Any, ...]
    reference: Callable[..., Tensor]
    fake: Callable[..., Tensor]
    fuse: Callable[[Site], Call]
    samples: Callable[[torch.Generator], Iterable[Sample]]
    examples: Callable[[torch.Generator], Iterable[Example]]
    decline: Callable[[fx.Node], str | None] = no_objection
    operands: Callable[[fx.Node], tuple[fx.Node, ...]] = activations
    output: Output = Output.OBSERVED
    weight_arg: int | None = None
    bias_arg: int | None = None
    absorbs_clamp: bool = False
    absorbs_residual: bool = False

    @property
    def op(self) -> Any:
        """What the integer graph calls: ``torch.ops.qcompile.<name>.default``; a shape row's first ATen operator."""
        if self.schema is None:
            return self.aten[0]
        return getattr(torch.ops.qcompile, self.name).default

    def register(self) -> None:
        """Define ``torch.ops.qcompile.<name>`` with the reference as its CPU kernel."""
        if self.schema is None:
            return
        LIBRARY.define(f"{self.name}{self.schema}")
        LIBRARY.impl(self.name, self.reference, "CPU")
        torch.library.register_fake(f"qcompile::{self.name}", self.fake, lib=LIBRARY)


def random_int8(g: torch.Generator, *shape: int, lo: int = QMIN, hi: int = QMAX) -> Tensor:
    """Uniform random int8 in [lo, hi], never all zeros in practice: test data."""
    return torch.randint(lo, hi + 1, shape, generator=g, dtype=torch.int32).to(torch.int8)


def random_clamp(g: torch.Generator) -> tuple[int, int]:
    """A random clamp (lo, hi), every second one the full range: test data."""
    lo, hi, narrow = (int(v) for v in torch.randint(0, 100, (3,), generator=g))
    return (QMIN + lo, QMAX - hi) if narrow % 2 else (QMIN, QMAX)


def with_random_parameters(module: nn.Module, g: torch.Generator) -> nn.Module:
    """`module` with its parameters drawn from `g` (their own initialization takes the global generator)."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.5, 0.5, generator=g)
    return module
