"""The pass manager: a wrong order is refused before anything runs, a pass that breaks the graph is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from passing import Block, passes_until, randn, randomize, run_until
from torch import fx, nn

from qcompile import rewrite
from qcompile.capture import capture
from qcompile.errors import CalibrationError, PassError, PipelineError
from qcompile.ir import Program, Property, Stage
from qcompile.manager import PassManager, check_order
from qcompile.passes import Context, Pass, default_pipeline
from qcompile.passes.canonicalize import Canonicalize
from qcompile.passes.fold_batchnorm import FoldBatchnorm
from qcompile.quantizer import quantize
from qcompile.text import graph_text
from qcompile.verify import interface

aten = torch.ops.aten
X = randn(1, 4, 6, 6)


def captured() -> Program:
    return capture(randomize(Block()), (X,))


@dataclass(frozen=True)
class Step(Pass):
    """A pass that does `action` and notes in `log` that it ran."""

    action: Callable[[Program], Any] = lambda program: False
    log: list[str] = field(default_factory=list)

    name: ClassVar[str] = "step"

    def run(self, program: Program, context: Context) -> bool:
        self.log.append(self.name)
        return bool(self.action(program))


@dataclass(frozen=True)
class Needy(Step):
    name: ClassVar[str] = "needy"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.CANONICAL, Property.BATCHNORM_FOLDED})


def run_step(action: Callable[[Program], Any]) -> Program:
    """The program after canonicalize and a pass that does `action`."""
    program = captured()
    PassManager((Canonicalize(), Step(action))).run(program, Context())
    return program


# --- order ---------------------------------------------------------------------------------------


def test_an_unmet_requirement_is_refused_before_anything_runs() -> None:
    log: list[str] = []
    program = captured()
    before = graph_text(program)
    with pytest.raises(PipelineError) as caught:
        PassManager((Step(log=log), Canonicalize(), Needy(log=log))).run(program, Context())
    assert caught.value.what == "pass 'needy' requires BATCHNORM_FOLDED, which does not hold where it stands"
    assert "position 2, after step, canonicalize; there holds CANONICAL, FLOAT" in str(caught.value.where)
    assert caught.value.remedy
    assert log == []
    assert graph_text(program) == before


def test_a_stage_ends_the_one_before_it() -> None:
    """A float pass cannot run on an observed graph, although FLOAT held once."""
    with pytest.raises(PipelineError, match=r"'late' requires FLOAT(.|\n)*there holds (.*)OBSERVED"):
        check_order((*passes_until("calibrate"), Late()), {Property.FLOAT})


@dataclass(frozen=True)
class Late(Step):
    name: ClassVar[str] = "late"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.FLOAT})


def test_the_order_check_says_what_holds_in_the_end() -> None:
    held = check_order(passes_until("calibrate"), {Property.FLOAT})
    assert held == {Property.CANONICAL, Property.BATCHNORM_FOLDED, Property.OBSERVED, Property.CALIBRATED}


def test_two_passes_of_one_name_are_refused_before_anything_runs() -> None:
    log: list[str] = []
    with pytest.raises(PipelineError, match="two passes are named 'step'"):
        PassManager((Step(log=log), Step(log=log))).run(captured(), Context())
    assert log == []


def test_a_class_in_the_place_of_a_pass_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"is not a pass(.|\n)*MyPass\(\), not MyPass"):
        PassManager((Canonicalize,)).run(captured(), Context())  # type: ignore[arg-type]


# --- a pass that breaks the graph ------------------------------------------------------------------


def add_to_output(program: Program, target: Callable[..., Any], *more: Any) -> bool:
    """Put a call of `target` behind the model's last operator."""
    (output,) = (n for n in program.graph.nodes if n.op == "output")
    (last,) = program.outputs()
    with program.graph.inserting_before(output):
        new = program.graph.call_function(target, (last, *more))
    new.meta["nn_module_stack"] = {"": ("second.0", nn.Conv2d)}
    output.args = ((new,),)
    return True


def raises(program: Program) -> bool:
    raise RuntimeError("boom")


def drops_the_input(program: Program) -> bool:
    (x,) = program.placeholders()
    x.replace_all_uses_with(program.outputs()[0])
    program.graph.erase_node(x)
    return True


def adds_an_input(program: Program) -> bool:
    with program.graph.inserting_before(program.placeholders()[0]):
        node = program.graph.placeholder("extra")
    node.meta["val"] = program.placeholders()[1].meta["val"]
    return True


def calls_a_module(program: Program) -> bool:
    program.graph_module.add_module("identity", nn.Identity())
    (last,) = program.outputs()
    with program.graph.inserting_after(last):
        node = program.graph.call_module("identity", (last,))
    last.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    return True


BREAKS: dict[str, tuple[Callable[[Program], Any], str]] = {
    "raises": (raises, r"failed: RuntimeError: boom"),
    "a constant that is gone": (
        lambda p: delattr(p.graph_module, "first_0_weight"),
        "left a graph that does not run(.*)first_0_weight",
    ),
    "shapes that do not fit": (
        lambda p: add_to_output(p, aten.reshape.default, [7, 7]),
        r"left a graph that does not run: (.|\n)*node reshape\w* of module second\.0",
    ),
    "a cycle": (drops_the_input, "left a graph that does not run"),
    "an operator of a later stage": (
        lambda p: add_to_output(p, torch.ops.qcompile.quantize.default, 1.0, 0),
        r"illegal graph: qcompile.quantize.default belongs to another stage \(stage float\)(.|\n)*of module second\.0",
    ),
    "a Python function": (
        lambda p: add_to_output(p, torch.relu),
        r"illegal graph: (.*) is not an ATen operator(.|\n)*node relu\w* of module second\.0",
    ),
    "a module": (calls_a_module, r"illegal graph: a call of module identity(.|\n)*node identity"),
    "another type": (lambda p: add_to_output(p, aten.argmax.default, 1, True), "the outputs were"),
    "another size": (
        lambda p: add_to_output(p, aten.max_pool2d.default, [2, 2]),
        r"the outputs were \(\(torch.float32, \(1, 4, 6, 6\)\),\) and are now \(\(torch.float32, \(1, 4, 3, 3\)\),\)",
    ),
    "another rank": (lambda p: add_to_output(p, aten.flatten.using_ints, 1), "the outputs were"),
    "another input": (adds_an_input, "the graph has 2 inputs, not 1"),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_pass_that_breaks_the_graph_is_named(case: str) -> None:
    action, message = BREAKS[case]
    with pytest.raises(PassError, match=message) as caught:
        run_step(action)
    assert caught.value.what.startswith("pass 'step' ")
    assert f"pass 'step' ({Step.__module__}.Step), after canonicalize" in str(caught.value.where)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("scale", 0.0, "scale is 0.0, and must be positive and finite"),
        ("scale", -1.0, "scale is -1.0"),
        ("scale", math.nan, "scale is nan"),
        ("scale", math.inf, "scale is inf"),
        ("zero_point", 500, "zero_point is 500, and must be from -128 to 127"),
        ("zero_point", -129, "zero_point is -129"),
    ],
)
@pytest.mark.parametrize("operator", ["quantize_per_tensor", "dequantize_per_tensor"])
def test_a_pass_that_writes_an_impossible_quantization_is_named(
    operator: str, argument: str, value: float, message: str
) -> None:
    with pytest.raises(PassError, match=f"pass 'edit' left an illegal graph: {message}"):
        compiled_with_edit(f"{operator}.default", argument, value, "quantize")


def test_a_pass_that_lets_dequantize_differ_from_quantize_is_named() -> None:
    with pytest.raises(PassError, match=r"pass 'edit' left an illegal graph: it takes .*in front of it"):
        compiled_with_edit("dequantize_per_tensor.default", "scale", 0.123, "quantize")


@pytest.mark.parametrize(
    ("operator", "argument", "value"),
    [
        ("quantize", "inv_scale", 0.0),
        ("quantize", "inv_scale", math.nan),
        ("quantize", "zero_point", 2**31),
        ("dequantize", "scale", math.inf),
        ("conv2d", "zero_point", 500),
    ],
)
def test_the_same_among_integers(operator: str, argument: str, value: float) -> None:
    with pytest.raises(PassError, match=r"pass 'edit' left an illegal graph: (inv_scale|scale|\w*zero_point) is"):
        compiled_with_edit(f"{operator}.default", argument, value, "fuse_requantize")


def compiled_with_edit(operator: str, argument: str, value: float, behind: str) -> None:
    """Quantize a convolution in a pipeline with a pass that sets an argument of each call of `operator`."""

    @dataclass(frozen=True)
    class Edit(Pass):
        name: ClassVar[str] = "edit"

        def run(self, program: Program, context: Context) -> bool:
            nodes = [n for n in program.graph.nodes if str(n.target).split(".", 1)[-1] == operator]
            assert nodes
            for node in nodes:
                at = [a.name for a in node.target._schema.arguments].index(argument)
                node.args = (*node.args[:at], value, *node.args[at + 1 :])
            return True

    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    pipeline = default_pipeline().after(behind, Edit())
    quantize(model, calibration=[torch.randn(16, 3, 8, 8)], pipeline=pipeline)


def test_a_rule_that_raises_names_the_node_the_module_and_the_line() -> None:
    def replace(program: Program, node: fx.Node) -> fx.Node:
        raise ValueError("no such thing")

    rule = rewrite.Rule("wrong", (aten.conv2d.default,), lambda program, node: None, replace)
    with pytest.raises(PassError, match="pass 'step' failed: ValueError: no such thing") as caught:
        run_step(lambda program: rewrite.apply([rule], program, Context()))
    assert "of module first.0" in str(caught.value.where)
    assert str(caught.value.source).endswith("return torch.relu(self.second(self.first(x)) + x)")
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_pass_may_not_fix_a_dynamic_size() -> None:
    batch = ({0: torch.export.Dim("batch", max=8)},)
    program = capture(randomize(Block()), (randn(2, 4, 6, 6),), batch)
    step = Step(action=lambda p: add_to_output(p, aten.slice.Tensor, 0, 0, 1))
    with pytest.raises(PassError, match=r"\(None, 4, 6, 6\)(.*) and are now (.*)\(1, 4, 6, 6\)"):
        PassManager((step,)).run(program, Context())


def test_an_error_that_already_says_where_stays_as_it_is() -> None:
    error = CalibrationError("a batch is wrong", where="calibration batch 3")

    def action(program: Program) -> bool:
        raise error

    with pytest.raises(CalibrationError) as caught:
        run_step(action)
    assert caught.value is error


# --- what the manager does after a pass ---------------------------------------------------------------


def test_dead_nodes_and_unused_constants_are_dropped() -> None:
    def action(program: Program) -> bool:
        with program.graph.inserting_after(program.placeholders()[0]):
            program.graph.call_function(aten.relu.default, (program.placeholders()[0],))
        program.graph_module.register_buffer("unused", randn(3))
        return True

    program = run_step(action)
    assert [n.name for n in program.graph.nodes if not n.users and n.op != "output"] == []
    assert "unused" not in dict(program.graph_module.named_buffers())


def test_shapes_are_recomputed() -> None:
    """The pass gives its nodes no shape, and one has another than the last one before."""
    program = run_step(
        lambda p: (
            add_to_output(p, aten.constant_pad_nd.default, [1, 1]) and add_to_output(p, aten.slice.Tensor, 3, 1, 7)
        )
    )
    (last,) = program.outputs()
    assert tuple(last.args[0].meta["val"].shape) == (1, 4, 6, 8)  # type: ignore[union-attr]
    assert interface(program) == ((torch.float32, (1, 4, 6, 6)),)


def test_the_records_say_what_each_pass_did() -> None:
    program = captured()
    records = PassManager(passes_until("fuse_requantize")).run(program, Context(calibration=[(X,)]))
    assert [(r.name, r.changed) for r in records] == [
        ("canonicalize", False),
        ("fold_batchnorm", True),
        ("insert_observers", True),
        ("calibrate", False),
        ("quantize", True),
        ("fuse_requantize", True),
    ]
    assert [r.nodes_after for r in records[:-1]] == [r.nodes_before for r in records[1:]]
    assert program.stage is Stage.INTEGER
    assert Property.FLOAT not in program.properties


@pytest.mark.parametrize("step", [Canonicalize(), FoldBatchnorm()], ids=lambda step: step.name)
def test_a_second_run_reports_no_change(step: Pass) -> None:
    program = run_until("fold_batchnorm", randomize(Block()), (X,))
    text = graph_text(program)
    (record,) = PassManager((step,)).run(program, Context())
    assert not record.changed
    assert graph_text(program) == text
