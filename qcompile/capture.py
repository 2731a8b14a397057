"""capture(): a PyTorch model -> Program, through torch.export.

torch.export gives functional ATen with parameters lifted to inputs; here they become constants
(``get_attr``) of the graph, copied, so that the user's model is neither modified nor watched.
Whatever cannot be compiled faithfully is refused: training-mode layers, control flow on data, random
numbers, mutated buffers, weights that are not finite or not float32, variances that are not positive.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from qcompile.errors import CalibrationError, CaptureError
from qcompile.inputs import example_call, input_specs, is_empty, output_structure
from qcompile.ir import ORIGIN, Origin, Program, Property, Stage, constant, finish, is_constant, source, where
from qcompile.qdq import NAMESPACE
from qcompile.trace import export_refused

aten = torch.ops.aten

_TRAINING_NORMS = (
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit.default,
    aten._batch_norm_with_update_functional.default,
    aten.native_batch_norm.default,
)
_INFERENCE_NORMS = (aten._native_batch_norm_legit_no_training.default, aten.batch_norm.default)
_TRAINING_ONLY = frozenset({"train", "training", "p", "dropout", "dropout_p"})  # arguments: random only when all are on
_REMEDY_EVAL = "call model.eval() before exporting or compiling; a functional call needs training=self.training"
# Checks that torch.export leaves in the graph; the compiled model checks its own inputs.
_ASSERTIONS = (
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
)


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
) -> Program:
    """Capture `model` as a float Program, or as a qdq one where it has been quantized (by torchao's PT2E flow).

    Args:
        model: an nn.Module (an fx.GraphModule is one) in eval mode, or an ExportedProgram.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. An
            ExportedProgram brings its own.
        dynamic_shapes: as torch.export takes it. An example of size 1 along a dynamic dimension is
            repeated, because torch.export would take the 1 for a constant.

    Raises:
        CalibrationError: there are no example inputs, or their floats are not float32.
        CaptureError: the model cannot be captured; says why, where and what to do.
    """
    if isinstance(model, ExportedProgram):
        if dynamic_shapes is not None:
            raise CaptureError(
                "an ExportedProgram already has its dynamic shapes", remedy="give dynamic_shapes to torch.export"
            )
        exported = model
    elif isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("the model is TorchScript", remedy="pass the nn.Module that it was made from")
    elif isinstance(model, nn.Module):
        if is_empty(example_inputs):
            raise CalibrationError(
                "no example inputs", remedy="pass example_inputs=(tensor, ...), or calibration data to take them from"
            )
        check_eval(model)
        args, kwargs = example_call(model, example_inputs, dynamic_shapes)
        with _exporting():
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    else:
        raise CaptureError(
            f"the model is a {type(model).__name__}",
            remedy="pass an nn.Module, an fx.GraphModule or a torch.export.ExportedProgram",
        )
    with _exporting():
        exported = exported.run_decompositions({})
    return _program(exported, dynamic_shapes)


@contextmanager
def _exporting() -> Iterator[None]:
    """Within, torch.export's refusals become CaptureErrors, and its warnings about itself are not the user's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`isinstance", category=FutureWarning)
        try:
            yield
        except Exception as error:
            raise export_refused(error) from error


def _program(exported: ExportedProgram, dynamic_shapes: Any) -> Program:
    _check_signature(exported)
    graph_module = _unlift(exported)
    for node in graph_module.graph.nodes:
        _check_node(node)
        _check_variance(graph_module, node)
    specs = input_specs(exported, graph_module, dynamic_shapes)
    structure = output_structure(exported)
    given = _holds_qdq(graph_module.graph)
    stage, begins = (Stage.QDQ, Property.GIVEN_QDQ) if given else (Stage.FLOAT, Property.FLOAT)
    program = Program(graph_module, stage, specs, structure, {begins})
    finish(program)
    if not program.outputs():
        raise CaptureError("the model returns nothing", remedy="return a tensor, or a tuple or dict of tensors")
    return program


def check_eval(model: nn.Module) -> None:
    """Refuse weights without values, and batch norm and dropout in training mode."""
    for path, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CaptureError(
                "the weight has no values (device 'meta')", where=path, remedy="load the weights onto the CPU first"
            )
    for path, module in model.named_modules():
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
        normalizes = isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm))
        if module.training and (drops or (normalizes and module.track_running_stats)):
            raise CaptureError(
                f"{type(module).__name__} is in training mode",
                where=path or type(model).__name__,
                remedy="call model.eval() before compiling",
            )


def _check_signature(exported: ExportedProgram) -> None:
    """Refuse what a pure function of the inputs cannot express."""
    kinds = {
        OutputKind.BUFFER_MUTATION: "the model changes its buffer",
        OutputKind.PARAMETER_MUTATION: "the model changes its parameter",
        OutputKind.USER_INPUT_MUTATION: "the model changes its input",
    }
    for node in exported.graph.nodes:  # named first: a training-mode batch norm also changes buffers
        _check_node(node)
    for spec in exported.graph_signature.output_specs:
        if spec.kind in kinds:
            made = next((n for n in exported.graph.nodes if n.name == spec.arg.name), None)
            raise CaptureError(
                f"{kinds[spec.kind]} {spec.target!r} when it runs",
                where=where(made) if made is not None else None,
                source=source(made) if made is not None else None,
                remedy="change a copy: x = x + 1, not x += 1"
                if spec.kind is OutputKind.USER_INPUT_MUTATION
                else "call model.eval(); state that changes from call to call must be an input and an output",
            )


def _check_node(node: fx.Node) -> None:
    """Refuse control flow on data, training-mode operators and random numbers."""
    if node.op != "call_function":
        return
    here = {"where": where(node) or "the model's own forward", "source": source(node)}
    if node.target is torch.ops.higher_order.out_dtype or getattr(node.target, "namespace", "") == "torchao":
        raise CaptureError(
            f"the model is quantized in another form than quantize and dequantize nodes: {node.target}",
            remedy="convert it with torchao's convert_pt2e(model), without use_reference_representation",
            **here,
        )
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        raise CaptureError(
            f"control flow on data: torch.ops.higher_order.{node.target.name()}",
            remedy="compute both branches and choose with torch.where, or unroll the loop",
            **here,
        )
    if node.target is aten._native_batch_norm_legit.no_stats:
        raise CaptureError(
            "batch norm without running statistics",
            remedy="call model.eval(); a batch norm must track running statistics to be compiled",
            **here,
        )
    if node.target in _TRAINING_NORMS or (node.target is aten.batch_norm.default and node.args[5]):
        raise CaptureError("batch norm in training mode", remedy=_REMEDY_EVAL, **here)
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        _check_random(node, here)


def _check_random(node: fx.Node, here: dict[str, Any]) -> None:
    """Refuse an operator that draws random numbers, unless its arguments say that here it does not."""
    switches = [value for name, value in _arguments(node).items() if name in _TRAINING_ONLY]
    operator: Any = node.target
    name = operator._schema.name.removeprefix("aten::").removeprefix("native_")
    if not switches:
        raise CaptureError(f"{name} draws random numbers", remedy="make them an input of the model", **here)
    if all(value is None or value for value in switches):
        raise CaptureError(f"{name} in training mode", remedy=_REMEDY_EVAL, **here)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by name, its defaults among them."""
    operator: Any = node.target
    return {
        argument.name: node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        for i, argument in enumerate(operator._schema.arguments)
    }


def _check_variance(graph_module: fx.GraphModule, node: fx.Node) -> None:
    """Refuse a batch norm that would divide by zero or by the root of a negative number."""
    if node.target not in _INFERENCE_NORMS:
        return
    given = _arguments(node)
    if not (isinstance(given["running_var"], fx.Node) and is_constant(given["running_var"])):
        return
    least = float(constant(graph_module, given["running_var"]).min())
    if least + given["eps"] <= 0:
        raise CaptureError(
            f"the running variance of the batch norm is {least:g}, and with eps it must be positive",
            where=where(node) or "the model's own forward",
            source=source(node),
            remedy="load a checkpoint whose running_var is as training left it; the model itself cannot be right",
        )


def _unlift(exported: ExportedProgram) -> fx.GraphModule:
    """The exported graph with its lifted parameters, buffers and constants as get_attr again."""
    graph_module = fx.GraphModule(nn.Module(), fx.Graph())
    graph, env = graph_module.graph, dict[fx.Node, fx.Node]()
    by_name = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    # Inputs first: they carry the fake mode that the constants' shapes are made in.
    lifted = [n for n in exported.graph.nodes if n.op == "placeholder"]
    for node in sorted(lifted, key=lambda n: by_name[n.name].kind is not InputKind.USER_INPUT):
        spec = by_name[node.name]
        if spec.kind is InputKind.USER_INPUT:
            if isinstance(node.meta.get("val"), Tensor):
                env[node] = graph.node_copy(node)
            elif node.users:
                raise CaptureError(
                    f"the input {node.name!r} is not a tensor",
                    remedy="pass it as a tensor, or fix its value in the model",
                )
            continue
        value = _constant_value(exported, spec)
        env[node] = _constant_node(graph_module, node, value, str(spec.target))
        if spec.kind is InputKind.PARAMETER:
            env[node].meta[ORIGIN] = Origin(str(spec.target), value.requires_grad)
    for node in exported.graph.nodes:
        if node.op == "get_attr":
            value = getattr(exported.graph_module, str(node.target))
            if not isinstance(value, Tensor):
                continue  # the branches of a higher-order operator, which _check_signature has refused
            env[node] = _constant_node(graph_module, node, value, str(node.target))
        elif node.op == "call_function" and node.target not in _ASSERTIONS:
            env[node] = graph.node_copy(node, lambda n: env[n])
        elif node.op == "output":
            flat = [v for v in node.args[0] if v is not None]
            for value in flat:
                if not (isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)):
                    kind = "number" if isinstance(value, fx.Node) else type(value).__name__
                    raise CaptureError(f"the model returns a {kind}", remedy="return tensors only")
            graph.output(tuple(env[v] for v in flat))
    graph_module.recompile()
    return graph_module


def _constant_node(graph_module: fx.GraphModule, node: fx.Node, value: Tensor, path: str) -> fx.Node:
    name = path.replace(".", "_")
    while hasattr(graph_module, name):
        name += "_"
    _check_constant(value, path)
    # A copy: the program must not follow the model if it is trained on.
    graph_module.register_buffer(name, value.detach().to("cpu", copy=True).contiguous())
    new = graph_module.graph.get_attr(name)
    new.meta = dict(node.meta)
    return new


def _constant_value(exported: ExportedProgram, spec: Any) -> Tensor:
    if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in exported.state_dict:
        return exported.state_dict[spec.target]
    value = exported.constants.get(spec.target)
    if not isinstance(value, Tensor):
        raise CaptureError(
            f"the model uses {spec.target!r}, a {type(value).__name__}", remedy="compute with tensors only"
        )
    return value


def _check_constant(value: Tensor, path: str) -> None:
    module, _, leaf = path.rpartition(".")
    if not value.is_floating_point():
        if value.is_complex():
            raise CaptureError(f"the weight {leaf!r} is complex", where=module, remedy="use real tensors")
        return
    if value.dtype is not torch.float32:
        raise CaptureError(
            f"the weight {leaf!r} is {value.dtype}", where=module, remedy="call model.float() before compiling"
        )
    # -inf is what attention masks are made of; a parameter is never a mask.
    if torch.isnan(value).any() or (isinstance(value, nn.Parameter) and torch.isinf(value).any()):
        raise CaptureError(
            f"the weight {leaf!r} holds NaN or infinity",
            where=module or "the model",
            remedy="load a checkpoint that is finite; the model itself cannot be right",
        )


def is_quantized(model: nn.Module | ExportedProgram) -> bool:
    """Whether `model` was quantized elsewhere: it, or a part of it, is a graph with quantize and dequantize."""
    if isinstance(model, ExportedProgram):
        return _holds_qdq(model.graph)
    parts = model.modules() if isinstance(model, nn.Module) else ()
    return any(isinstance(part, fx.GraphModule) and _holds_qdq(part.graph) for part in parts)


def _holds_qdq(graph: fx.Graph) -> bool:
    return any(getattr(node.target, "namespace", "") == NAMESPACE for node in graph.nodes)
