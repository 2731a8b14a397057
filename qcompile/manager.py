"""PassManager: checks a pipeline before anything runs, runs it, and verifies the graph after every pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from qcompile.errors import PassError, PipelineError, QcompileError
from qcompile.ir import NodeFailure, Program, Property, Stage, finish, source, where
from qcompile.passes.base import Context, Pass
from qcompile.text import graph_text
from qcompile.verify import IllegalGraph, Interface, interface, verify

STAGE_OF = {
    Property.FLOAT: Stage.FLOAT,
    Property.OBSERVED: Stage.OBSERVED,
    Property.GIVEN_QDQ: Stage.QDQ,
    Property.QDQ: Stage.QDQ,
    Property.INTEGER: Stage.INTEGER,
}

Dump = Callable[[int, str, str], None]
"""Called with (position, pass name, graph text); position 0 is the captured graph."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: for `inspect`."""

    name: str
    changed: bool
    nodes_before: int
    nodes_after: int
    seconds: float


def _after(properties: set[Property], establishes: frozenset[Property]) -> set[Property]:
    """A stage replaces the one before it; other properties accumulate."""
    kept = properties - set(STAGE_OF) if establishes & set(STAGE_OF) else properties
    return kept | establishes


def check_order(passes: Iterable[Pass], properties: set[Property]) -> set[Property]:
    """Refuse a pipeline in which some pass requires what nothing before it establishes.

    Returns what holds at its end.

    Raises:
        PipelineError: a requirement is unmet, two passes share a name, or one is no pass.
    """
    held, seen = set(properties), list[str]()
    for step in passes:
        if not isinstance(step, Pass):
            raise PipelineError(
                f"{step!r} is not a pass",
                where=f"pipeline position {len(seen)}",
                remedy="give instances of qcompile.passes.Pass: MyPass(), not MyPass",
            )
        if step.name in seen:
            raise PipelineError(
                f"two passes are named {step.name!r}", remedy="give each pass of a pipeline its own name"
            )
        missing = step.requires - held
        if missing:
            wanted = ", ".join(sorted(p.name for p in missing))
            holds = ", ".join(sorted(p.name for p in held)) or "nothing"
            raise PipelineError(
                f"pass {step.name!r} requires {wanted}, which does not hold where it stands",
                where=f"pipeline position {len(seen)}, after {', '.join(seen) or 'nothing'}; there holds {holds}",
                remedy="move it, or put a pass that establishes this before it",
            )
        held = _after(held, step.establishes)
        seen.append(step.name)
    return held


@dataclass(frozen=True)
class PassManager:
    """Runs a pipeline.

    Attributes:
        passes: in order.
        dump: where the graph after each pass goes: a folder (one text file per pass), a callable
            (see `Dump`), or None.
    """

    passes: tuple[Pass, ...]
    dump: str | Path | Dump | None = None

    def run(self, program: Program, context: Context) -> list[PassRecord]:
        """Run every pass on `program`, in place.

        Raises:
            PipelineError: before anything runs, when the order is wrong.
            PassError: a pass raised, or left a graph that is not legal; names it and its predecessors.
        """
        check_order(self.passes, program.properties)
        outputs = interface(program)
        records: list[PassRecord] = []
        self._dump(0, "capture", program)
        for step in self.passes:
            before, start = len(program.graph.nodes), time.perf_counter()
            changed = _run_pass(step, program, context, outputs, [r.name for r in records])
            seconds = time.perf_counter() - start
            records.append(PassRecord(step.name, changed, before, len(program.graph.nodes), seconds))
            self._dump(len(records), step.name, program)
        return records

    def _dump(self, position: int, name: str, program: Program) -> None:
        if self.dump is None:
            return
        text = graph_text(program)
        if callable(self.dump):
            self.dump(position, name, text)
            return
        folder = Path(self.dump)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{position:02d}_{name}.txt").write_text(text)


def _run_pass(step: Pass, program: Program, context: Context, outputs: Interface, ran: list[str]) -> bool:
    """One pass, then clean up and verify."""
    doing = "failed"
    try:
        changed = step.run(program, context)
        doing = "left a graph that does not run"
        stages = [STAGE_OF[p] for p in step.establishes if p in STAGE_OF]
        program.stage = stages[0] if stages else program.stage
        program.properties = _after(program.properties, step.establishes)
        finish(program)
        doing = "left an illegal graph"
        verify(program)
        if interface(program) != outputs:
            raise IllegalGraph(f"the outputs were {outputs} and are now {interface(program)}")
    except QcompileError:
        raise  # already says what was wrong and where
    except IllegalGraph as error:
        raise _pass_error(step, ran, f"{doing}: {error.reason}", error.node) from error
    except NodeFailure as error:
        raise _pass_error(step, ran, f"{doing}: {error}", error.node) from error.__cause__
    except Exception as error:
        raise _pass_error(step, ran, f"{doing}: {type(error).__name__}: {error}", None) from error
    return changed


def _pass_error(step: Pass, ran: list[str], what: str, node: fx.Node | None) -> PassError:
    place = (
        f"pass {step.name!r} ({type(step).__module__}.{type(step).__qualname__}), after {', '.join(ran) or 'capture'}"
    )
    if node is not None:
        place += f"; node {node.name}" + (f" of module {where(node)}" if where(node) else "")
    return PassError(
        f"pass {step.name!r} {what}",
        where=place,
        source=source(node) if node is not None else None,
        remedy="dump the graph after each pass to see what it did; a rewrite limit bisects it",
    )
