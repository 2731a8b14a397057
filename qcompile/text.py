"""A program as text: one line per node, for dumps, golden tests and `inspect`.

conv2d: f32[1, 8, 9, 9] = aten.conv2d(x, conv_weight, conv_bias, [1, 1], [1, 1])  # layer1.conv
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir import Program, where

_DTYPES = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{_DTYPES.get(value.dtype, str(value.dtype))}[{', '.join(str(d) for d in value.shape)}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_type(v) for v in value)})"
    return type(value).__name__


def _argument(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_argument(v) for v in value)}]"
    return str(value) if isinstance(value, fx.Node) else repr(value)


def _call(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    if node.op == "get_attr":
        return "constant"
    name = str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        name = name.removesuffix(".default")
    elif node.op == "call_module":
        owner = node.graph.owning_module
        assert owner is not None
        name = type(owner.get_submodule(str(node.target))).__name__
    elif callable(node.target):
        name = getattr(node.target, "__name__", name)
    args = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    return f"{name}({', '.join(args)})"


def graph_text(program: Program) -> str:
    """The graph of `program`, one line per node, in order; ends with the outputs."""
    lines = []
    for node in program.graph.nodes:
        if node.op == "output":
            lines.append(f"output: {_argument(node.args[0])}")
            continue
        path = where(node)
        line = f"{node.name}: {_type(node.meta.get('val'))} = {_call(node)}"
        lines.append(f"{line}  # {path}" if path and node.op == "call_function" else line)
    return "\n".join(lines) + "\n"
