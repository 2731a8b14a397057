"""The targets by name: those that ship here, and those that installed packages register."""

from __future__ import annotations

import difflib
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from qcompile.device import capability, lacks, machine
from qcompile.errors import DeviceError, TargetError
from qcompile.targets import arm, nvidia, x86
from qcompile.targets.base import Target

ENTRY_POINTS = "qcompile.targets"
GPU = "cuda"


def _registered(entry: EntryPoint) -> Target:
    """The target that an installed distribution registers."""
    place = f"entry point {entry.name!r} ({entry.value}) of the group {ENTRY_POINTS}"
    try:
        target = entry.load()
    except Exception as error:
        raise TargetError(
            f"a target cannot be loaded: {type(error).__name__}: {error}",
            where=place,
            remedy="repair or uninstall the distribution that registers it",
        ) from error
    if not isinstance(target, Target):
        raise TargetError(
            f"{target!r} is not a target",
            where=place,
            remedy="let it name an instance of qcompile.targets.Target",
        )
    return target


@cache
def _table() -> dict[str, Target]:
    """Every known target.

    Raises:
        TargetError: two share a name, or one that an installed distribution registers cannot be loaded.
    """
    table: dict[str, Target] = {}
    found = [*x86.TARGETS, *arm.TARGETS, *nvidia.TARGETS, *map(_registered, entry_points(group=ENTRY_POINTS))]
    for target in found:
        if target.name in table or target.name in ("native", GPU):
            raise TargetError(
                f"two targets are called {target.name!r}",
                where=f"entry points of the group {ENTRY_POINTS}",
                remedy="rename one of them",
            )
        table[target.name] = target
    return table


def names() -> list[str]:
    """The names that `get` takes, "native" first; it takes "cuda" besides, where there are targets for GPUs."""
    return ["native", *_table()]


def _is_gpu(target: Target) -> bool:
    return any(capability(feature) for feature in target.features)


def _best_gpu(targets: list[Target]) -> Target:
    """The highest-ranked target that the GPU of this machine can run."""
    reasons = {target.name: lacks(target.machine, target.features) for target in targets}
    able = [target for target in targets if not reasons[target.name]]
    if not able:
        least = min(targets, key=lambda target: (machine()[0] != target.machine, target.rank))
        raise DeviceError(
            f"this machine {reasons[least.name]}",
            where=f"target {GPU}",
            remedy=f"name the GPU to compile for: {', '.join(reasons)}",
        )
    return max(able, key=lambda target: target.rank)


def get(name: str, bfloat16: bool = False) -> Target:
    """The target called `name`; "native" is the best one that this machine's processor can run, and "cuda" its GPU.

    Args:
        bfloat16: whether the best one is one that multiplies bfloat16, where there is one.

    Raises:
        TargetError: no target has this name, or one that is installed cannot be loaded.
        DeviceError: this machine can run none of them ("native" and "cuda" only).
    """
    table = _table()
    if name == GPU and any(_is_gpu(target) for target in table.values()):
        return _best_gpu([target for target in table.values() if _is_gpu(target)])
    if name == "native":
        architecture, features = machine()
        able = [t for t in table.values() if t.machine == architecture and set(t.features) <= set(features)]
        if not able:
            raise DeviceError(
                f"no target fits this machine ({architecture}: {', '.join(sorted(features)) or 'no known features'})",
                remedy=f"compile for another machine: {', '.join(table)}",
            )
        return max(able, key=lambda t: (bfloat16 and t.isa.bfloat16 is not None, t.rank))
    if name not in table:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TargetError(f"unknown target {name!r}", remedy=f"{hint}known targets: {', '.join(names())}")
    return table[name]
