"""Rule: one local rewrite, and the driver that applies rules until none fires.

A rule anchors at some ATen operators. `check` returns None where the rule applies; where it nearly
does, why not (the reason goes to the ledger); and "" where the node is not the rule's business.
`replace` builds the node that takes over all uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from qcompile.ir import Program, blaming, copy_meta, fake_mode

if TYPE_CHECKING:
    from qcompile.passes.base import Context


@dataclass(frozen=True)
class Rule:
    """One rewrite.

    Attributes:
        name: as it appears in the ledger.
        pattern: the operators it anchors at.
        check: None where it applies; else why not ("" where there is nothing to say).
        replace: builds the replacement (the insertion point is before the node) and returns it.
    """

    name: str
    pattern: tuple[Any, ...]
    check: Callable[[Program, fx.Node], str | None]
    replace: Callable[[Program, fx.Node], fx.Node]


def call(program: Program, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new call at the insertion point, with its shape and the origin (module, source line) of `like`."""
    node = program.graph.call_function(target, args, kwargs)
    mode = fake_mode(program.graph_module)
    values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    with mode, enable_python_dispatcher(), torch.no_grad():
        node.meta["val"] = target(*values[0], **values[1])
    return copy_meta(node, like)


def apply(rules: Iterable[Rule], program: Program, context: Context) -> bool:
    """Apply `rules` in graph order until none fires. Returns whether anything changed."""
    by_target: dict[Any, list[Rule]] = {}
    for rule in rules:
        for target in rule.pattern:
            by_target.setdefault(target, []).append(rule)
    changed = False
    while _sweep(by_target, program, context):
        changed = True
    return changed


def _sweep(by_target: dict[Any, list[Rule]], program: Program, context: Context) -> bool:
    changed = False
    for node in list(program.graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        for rule in by_target.get(node.target, ()):
            with blaming(node):
                reason = rule.check(program, node)
            if reason is not None:
                if reason:
                    program.ledger.decline(rule.name, node, reason)
                continue
            if not context.spend(rule.name, node):
                return changed
            with blaming(node), program.graph.inserting_before(node):
                new = rule.replace(program, node)
            node.replace_all_uses_with(new)
            if not node.users:  # at once: dead code that could draw random numbers would be kept
                program.graph.erase_node(node)
            changed = True
            break
    program.graph.eliminate_dead_code()
    return changed
