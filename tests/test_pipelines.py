"""Pipelines are values that are edited by name; installed packages add passes and targets by entry point."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from passing import randn
from torch import nn

import qcompile
from qcompile.errors import PipelineError, TargetError
from qcompile.ir import Program, Property
from qcompile.passes import Context, Pass, default_pipeline, pipelines
from qcompile.targets import registry

NAMES = (
    "canonicalize",
    "fold_batchnorm",
    "insert_observers",
    "calibrate",
    "quantize",
    "fuse_requantize",
    "fold_padding",
    "quantize_linear_weights",
    "fuse_float",
)


@dataclass(frozen=True)
class Nothing(Pass):
    """Does nothing, `times` times."""

    times: int = 1

    name: ClassVar[str] = "nothing"
    joins_after: ClassVar[str | None] = "fold_batchnorm"

    def run(self, program: Program, context: Context) -> bool:
        return False


@dataclass(frozen=True)
class Other(Nothing):
    name: ClassVar[str] = "other"
    joins_after: ClassVar[str | None] = "nothing"


# --- edits -------------------------------------------------------------------------------------------


def test_the_default_pipeline_goes_from_float_to_integer() -> None:
    assert default_pipeline().names == NAMES
    assert default_pipeline(qcompile.QuantConfig(observer="percentile")).names == NAMES
    assert len(default_pipeline()) == len(NAMES)


def test_a_pass_goes_before_after_or_in_the_place_of_another() -> None:
    pipeline, step = default_pipeline(), Nothing()
    assert pipeline.before("canonicalize", step).names == ("nothing", *NAMES)
    assert pipeline.after("canonicalize", step).names == (NAMES[0], "nothing", *NAMES[1:])
    assert pipeline.after("fuse_float", step).names == (*NAMES, "nothing")
    assert pipeline.replace("fuse_float", step).names == (*NAMES[:-1], "nothing")
    assert pipeline.without("fuse_float").names == NAMES[:-1]


def test_an_edit_leaves_the_pipeline_itself_alone() -> None:
    pipeline = default_pipeline()
    for edited in (
        pipeline.before("quantize", Nothing()),
        pipeline.after("quantize", Nothing()),
        pipeline.replace("quantize", Nothing()),
        pipeline.without("quantize"),
    ):
        assert edited != pipeline
    assert pipeline.names == NAMES
    with pytest.raises(dataclasses.FrozenInstanceError):
        pipeline.passes = ()  # type: ignore[misc]


def test_pipelines_compare_by_their_passes_and_options() -> None:
    pipeline = default_pipeline()
    assert pipeline == default_pipeline()
    assert pipeline.after("quantize", Nothing(2)) == default_pipeline().after("quantize", Nothing(2))
    assert pipeline.after("quantize", Nothing(2)) != pipeline.after("quantize", Nothing(3))
    assert pipeline.after("quantize", Nothing()).without("nothing") == pipeline


def test_a_pipeline_prints_its_passes_with_their_options() -> None:
    text = str(default_pipeline().after("canonicalize", Nothing(times=3)))
    assert text.startswith("Canonicalize() -> Nothing(times=3) -> FoldBatchnorm() -> ")


@pytest.mark.parametrize("edit", ["before", "after", "replace", "without"])
def test_an_unknown_name_lists_the_near_ones(edit: str) -> None:
    step = () if edit == "without" else (Nothing(),)
    with pytest.raises(PipelineError, match=r"no pass 'quantise'(.|\n)*did you mean quantize or fuse_requantize\?"):
        getattr(default_pipeline(), edit)("quantise", *step)


def test_a_name_like_none_lists_them_all() -> None:
    with pytest.raises(PipelineError, match=f"it has {', '.join(NAMES)}"):
        default_pipeline().without("x")


def test_a_name_stands_only_once() -> None:
    pipeline = default_pipeline().after("quantize", Nothing())
    for again in (
        lambda: pipeline.after("calibrate", Nothing(2)),
        lambda: pipeline.before("calibrate", Nothing(2)),
        lambda: pipeline.replace("calibrate", Nothing(2)),
        lambda: pipelines.Pipeline((Nothing(), Nothing())),
    ):
        with pytest.raises(PipelineError, match="two passes are named 'nothing'"):
            again()
    assert pipeline.replace("nothing", Nothing(2)).passes[5] == Nothing(2)


@pytest.mark.parametrize("passes", [(), tuple(default_pipeline())[:5]], ids=["empty", "qdq"])
def test_a_pipeline_must_end_in_an_integer_program(passes: tuple[Pass, ...]) -> None:
    with pytest.raises(PipelineError, match=r"does not end in an integer program(.|\n)*fuse_requantize"):
        qcompile.quantize(nn.ReLU(), calibration=[randn(2, 3)], pipeline=pipelines.Pipeline(passes))


def test_what_a_removed_pass_established_is_missed_by_name() -> None:
    with pytest.raises(PipelineError, match="'quantize' requires CALIBRATED"):
        qcompile.quantize(nn.ReLU(), calibration=[randn(2, 3)], pipeline=default_pipeline().without("calibrate"))
    assert Property.CALIBRATED in next(p for p in default_pipeline() if p.name == "quantize").requires


# --- entry points --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What importlib.metadata gives for a registered name."""

    name: str
    made: Any
    value: str = "a_package:thing"

    def load(self) -> Any:
        if isinstance(self.made, Exception):
            raise self.made
        return self.made


def install(monkeypatch: pytest.MonkeyPatch, module: Any, group: str, *made: Any) -> None:
    """Pretend that a distribution registers `made` under names in this order."""
    entries = [Entry(f"{i}", value) for i, value in enumerate(made)]
    registered = {group: entries}
    monkeypatch.setattr(module, "entry_points", lambda *, group: registered.get(group, []))


@pytest.mark.parametrize("made", [Nothing, Nothing(1), lambda: Nothing(1)], ids=["class", "instance", "factory"])
def test_an_installed_pass_joins_where_it_says(monkeypatch: pytest.MonkeyPatch, made: Any) -> None:
    install(monkeypatch, pipelines, "qcompile.passes", made)
    assert default_pipeline().names == (*NAMES[:2], "nothing", *NAMES[2:])
    quantized = qcompile.quantize(nn.ReLU(), calibration=[randn(2, 3)])
    assert [record.name for record in quantized.passes][2] == "nothing"


def test_an_installed_pass_may_join_after_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, pipelines, "qcompile.passes", Nothing, Other)
    assert default_pipeline().names[1:4] == ("fold_batchnorm", "nothing", "other")


@dataclass(frozen=True)
class Homeless(Nothing):
    joins_after: ClassVar[str | None] = None


@dataclass(frozen=True)
class Lost(Nothing):
    joins_after: ClassVar[str | None] = "no_such_pass"


@dataclass(frozen=True)
class Demanding(Nothing):
    must: int = dataclasses.field(kw_only=True)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (Homeless, "cannot join the pipeline"),
        (Lost, "cannot join the pipeline"),
        (42, "42 cannot join the pipeline"),
        (dict, "cannot join the pipeline"),
        (Demanding, "cannot be loaded: TypeError: (.*)must"),
        (ImportError("no module named 'gone'"), "cannot be loaded: ImportError: no module named 'gone'"),
    ],
)
def test_what_cannot_join_names_the_entry_point(monkeypatch: pytest.MonkeyPatch, made: Any, message: str) -> None:
    install(monkeypatch, pipelines, "qcompile.passes", made)
    with pytest.raises(PipelineError, match=message) as caught:
        default_pipeline()
    assert caught.value.where == "entry point '0' (a_package:thing) of the group qcompile.passes"
    assert caught.value.remedy


def test_two_installed_passes_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, pipelines, "qcompile.passes", Nothing, Nothing(2))
    with pytest.raises(PipelineError, match="two passes are named 'nothing'"):
        default_pipeline()


# --- targets -------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    """The table of targets is made once per process; here, before and after the test again."""
    registry._table.cache_clear()
    yield
    registry._table.cache_clear()


MINE = dataclasses.replace(registry.get("x86-avx2"), name="x86-mine")


@pytest.mark.usefixtures("fresh_registry")
def test_an_installed_target_has_a_name_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, registry, "qcompile.targets", MINE)
    assert qcompile.targets.names()[-1] == "x86-mine"
    assert qcompile.targets.get("x86-mine") is MINE


@pytest.mark.usefixtures("fresh_registry")
@pytest.mark.parametrize("name", ["x86-avx2", "native"])
def test_an_installed_target_may_not_take_a_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install(monkeypatch, registry, "qcompile.targets", dataclasses.replace(MINE, name=name))
    with pytest.raises(TargetError, match=f"two targets are called '{name}'(.|\n)*qcompile.targets"):
        registry.names()


def test_an_unknown_target_lists_the_known_ones() -> None:
    with pytest.raises(TargetError, match="unknown target 'x86-avx512'") as caught:
        qcompile.compile(nn.ReLU(), "x86-avx512", calibration=[randn(2, 3)])
    assert "did you mean 'x86-avx512-vnni'?" in str(caught.value) or "did you mean 'x86-avx2'?" in str(caught.value)
    assert all(name in str(caught.value.remedy) for name in qcompile.targets.names())


def test_what_is_no_target_is_unknown() -> None:
    with pytest.raises(TargetError, match="unknown target 'None'"):
        qcompile.compile(nn.ReLU(), None, calibration=[randn(2, 3)])  # type: ignore[arg-type]


def test_a_class_is_no_pass() -> None:
    with pytest.raises(PipelineError, match=r"is not a pass(.|\n)*MyPass\(\), not MyPass"):
        default_pipeline().after("quantize", Pass)  # type: ignore[arg-type]
