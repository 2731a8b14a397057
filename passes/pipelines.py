"""Pipelines as values: tuples of passes, edited by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qcompile.config import QuantConfig
from qcompile.errors import PipelineError
from qcompile.passes.base import Pass
from qcompile.passes.calibrate import Calibrate
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.canonicalize_qdq import CanonicalizeQdq
from qcompile.passes.fold_batchnorm import FoldBatchnorm
from qcompile.passes.fold_padding import FoldPadding
from qcompile.passes.fuse_float import FuseFloat
from qcompile.passes.fuse_requantize import FuseRequantize
from qcompile.passes.insert_observers import InsertObservers
from qcompile.passes.keep_float import KeepFloat
from qcompile.passes.quantize import Quantize
from qcompile.passes.quantize_linear_weights import QuantizeLinearWeights
from qcompile.passes.round_weights import RoundWeights

ENTRY_POINTS = "qcompile.passes"


@dataclass(frozen=True)
class Pipeline:
    """An ordered tuple of passes. Every edit returns a new pipeline.

    Raises:
        PipelineError: two passes share a name, one is no pass, or an edit names a pass that is not there.
    """

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        for step in self.passes:
            if not isinstance(step, Pass):
                raise PipelineError(f"{step!r} is not a pass", remedy="give instances: MyPass(), not MyPass")
        repeated = [n for i, n in enumerate(self.names) if n in self.names[:i]]
        if repeated:
            raise PipelineError(
                f"two passes are named {repeated[0]!r}", remedy="give each pass of a pipeline its own name"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(p.name for p in self.passes)

    def before(self, name: str, step: Pass) -> Pipeline:
        """`step` inserted in front of the pass called `name`."""
        at = self._index(name)
        return Pipeline((*self.passes[:at], step, *self.passes[at:]))

    def after(self, name: str, step: Pass) -> Pipeline:
        """`step` inserted behind the pass called `name`."""
        at = self._index(name) + 1
        return Pipeline((*self.passes[:at], step, *self.passes[at:]))

    def replace(self, name: str, step: Pass) -> Pipeline:
        """`step` in the place of the pass called `name`."""
        at = self._index(name)
        return Pipeline((*self.passes[:at], step, *self.passes[at + 1 :]))

    def without(self, name: str) -> Pipeline:
        """The pipeline without the pass called `name`."""
        at = self._index(name)
        return Pipeline((*self.passes[:at], *self.passes[at + 1 :]))

    def _index(self, name: str) -> int:
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=2, cutoff=0.5)
            raise PipelineError(
                f"the pipeline has no pass {name!r}",
                remedy=f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(self.names)}",
            )
        return self.names.index(name)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __str__(self) -> str:
        return " -> ".join(str(p) for p in self.passes)


def qdq_pipeline() -> Pipeline:
    """Qdq to integer, for a model that is already quantized; with the passes of installed distributions that join
    behind one of these."""
    return _with_entry_points(
        Pipeline((CanonicalizeQdq(), FuseRequantize(), FoldPadding(), FuseFloat())), all_must_join=False
    )


def default_pipeline(config: QuantConfig | None = None) -> Pipeline:
    """Float to integer, with the passes that installed distributions add by entry point.

    Args:
        config: its preset says which passes win back accuracy; all else the passes read from their context.
    """
    pipeline = Pipeline(
        (
            Canonicalize(),
            FoldBatchnorm(),
            InsertObservers(),
            Calibrate(),
            Quantize(),
            *((RoundWeights(),) if config is not None and config.preset and config.kept_samples else ()),
            FuseRequantize(),
            FoldPadding(),
            QuantizeLinearWeights(),
            FuseFloat(),
        )
    )
    return _with_entry_points(pipeline)


def _with_entry_points(pipeline: Pipeline, *, all_must_join: bool = True) -> Pipeline:
    """`pipeline` with the passes that installed distributions add."""
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda e: e.name):
        step = _loaded(entry)
        joins = isinstance(step, Pass) and step.joins_after in pipeline.names
        if not joins and all_must_join:
            raise PipelineError(
                f"{step!r} cannot join the pipeline",
                where=_place(entry),
                remedy=f"let it name a Pass that sets `joins_after` to one of {', '.join(pipeline.names)}",
            )
        pipeline = pipeline.after(str(step.joins_after), step) if joins else pipeline
    return pipeline


def float_pipeline(numerics: str) -> Pipeline:
    """Float to code without integers: in "float32", or with the factors of convolutions and linear layers, and what
    they compute for each other, rounded to "bfloat16". It needs no calibration."""
    reason = f"numerics={numerics!r} is for the whole model"
    return Pipeline((Canonicalize(), FoldBatchnorm(), KeepFloat(reason), FuseFloat(numerics)))


def _place(entry: EntryPoint) -> str:
    return f"entry point {entry.name!r} ({entry.value}) of the group {ENTRY_POINTS}"


def _loaded(entry: EntryPoint) -> Any:
    try:
        made = entry.load()
        return made() if callable(made) else made
    except Exception as error:
        raise PipelineError(
            f"a pass cannot be loaded: {type(error).__name__}: {error}",
            where=_place(entry),
            remedy="repair or uninstall the distribution that registers it",
        ) from error
