"""The targets by name: those that ship here, and those that installed packages register."""

from __future__ import annotations

import difflib
from functools import cache
from importlib.metadata import entry_points

from qcompile.device import machine
from qcompile.errors import DeviceError, TargetError
from qcompile.targets import arm, x86
from qcompile.targets.base import Target


@cache
def _table() -> dict[str, Target]:
    """Every known target. Raises TargetError when two share a name."""
    table: dict[str, Target] = {}
    found = [*x86.TARGETS, *arm.TARGETS, *(entry.load() for entry in entry_points(group="qcompile.targets"))]
    for target in found:
        if target.name in table or target.name == "native":
            raise TargetError(
                f"two targets are called {target.name!r}",
                where="entry points of the group qcompile.targets",
                remedy="rename one of them",
            )
        table[target.name] = target
    return table


def names() -> list[str]:
    """The names that `get` takes, "native" first."""
    return ["native", *_table()]


def get(name: str) -> Target:
    """The target called `name`; "native" is the best one that this machine can run.

    Raises:
        TargetError: no target has this name.
        DeviceError: this machine can run none of them ("native" only).
    """
    table = _table()
    if name == "native":
        architecture, features = machine()
        able = [t for t in table.values() if t.machine == architecture and set(t.features) <= set(features)]
        if not able:
            raise DeviceError(
                f"no target fits this machine ({architecture}: {', '.join(sorted(features)) or 'no known features'})",
                remedy=f"compile for another machine: {', '.join(table)}",
            )
        return max(able, key=lambda t: t.rank)
    if name not in table:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TargetError(f"unknown target {name!r}", remedy=f"{hint}known targets: {', '.join(names())}")
    return table[name]
