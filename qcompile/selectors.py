"""Selectors: which layers a setting is meant for, by module path, by type, or by a predicate."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable
from typing import Any

from torch import fx

from qcompile.errors import ConfigError
from qcompile.ir import where

Selector = str | type | Callable[[fx.Node], bool]
"""A module path, which may be a shell pattern ("layer1.*.conv2") and covers the submodules; a class of module, as
`torch.nn.Linear`; or a function that is asked of each operator of the captured graph. A model's input goes by its
name."""
_REMEDY_PREDICATE = "it is called with each torch.fx node, and says yes or no; its module path: qcompile.ir.where(node)"


def selects(selector: Selector, node: fx.Node) -> bool:
    """Whether `selector` means the layer that `node` belongs to.

    Raises:
        ConfigError: it is a predicate, and raises.
    """
    if isinstance(selector, str):
        return any(fnmatch.fnmatchcase(prefix, selector) for prefix in _prefixes(_path(node)))
    if isinstance(selector, type):
        return _qualified(selector) in _types(node)
    try:
        return bool(selector(node))
    except Exception as error:
        raise ConfigError(
            f"the predicate {_named(selector)} raised {type(error).__name__}: {error}",
            where=f"{node.name} ({node.target}) of {where(node) or 'the model'}",
            remedy=_REMEDY_PREDICATE,
        ) from error


def check(selectors: Iterable[Selector], nodes: Iterable[fx.Node], setting: str) -> None:
    """Refuse a selector of `setting` that means none of `nodes`.

    Raises:
        ConfigError: names the selector, and what is there that is most like it.
    """
    nodes = list(nodes)
    for selector in selectors:
        if any(selects(selector, node) for node in nodes):
            continue
        if isinstance(selector, str):
            known = sorted({prefix for node in nodes for prefix in _prefixes(_path(node))})
            near = difflib.get_close_matches(selector, known, n=3, cutoff=0.4) or known[:3]
            raise ConfigError(
                f"the {setting} pattern {selector!r} matches no module that computes something",
                where=setting,
                remedy=f"did you mean {' or '.join(near)}?" if near else "the model has no named submodules",
            )
        if isinstance(selector, type):
            known = sorted({name for node in nodes for name in _types(node)[-1:]})
            raise ConfigError(
                f"the model has no {_qualified(selector)} that computes something",
                where=setting,
                remedy=f"it has {', '.join(known)}" if known else "the model has no submodules",
            )
        raise ConfigError(
            f"the predicate {_named(selector)} is true of no operator of the model",
            where=setting,
            remedy=_REMEDY_PREDICATE,
        )


def _named(predicate: Selector) -> str:
    return repr(getattr(predicate, "__qualname__", predicate))


def is_selector(value: Any) -> bool:
    """Whether `value` may stand where a selector is wanted."""
    return bool(value) if isinstance(value, str) else isinstance(value, type) or callable(value)


def _path(node: fx.Node) -> str:
    return str(node.target) if node.op == "placeholder" else where(node)


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _types(node: fx.Node) -> list[str]:
    """The qualified names of the modules that `node` lies in, the innermost last."""
    stack = node.meta.get("nn_module_stack") or {}
    return [kind if isinstance(kind, str) else _qualified(kind) for _, kind in stack.values()]


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
