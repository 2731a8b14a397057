"""Models quantized by torchao's PT2E flow, for the tests of graphs that come from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchao.quantization.pt2e import HistogramObserver, PerChannelMinMaxObserver, move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import (
    DerivedQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)
from torchao.quantization.pt2e.quantizer.arm_inductor_quantizer import (
    ArmInductorQuantizer,
    get_default_arm_inductor_quantization_config,
)
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

aten = torch.ops.aten
_WEIGHTED = (aten.conv2d.default, aten.conv1d.default, aten.linear.default)
_CLAMPS = (aten.relu.default, aten.relu_.default, aten.hardtanh.default, aten.hardtanh_.default, aten.relu6.default)
_SHARED = (aten.max_pool2d.default, aten.view.default, aten.flatten.using_ints)
_COMPUTING = (
    *_WEIGHTED, *_CLAMPS, aten.add.Tensor, aten.mul.Tensor, aten.cat.default, aten.adaptive_avg_pool2d.default,
    aten.hardswish.default, aten.sigmoid.default, aten.gelu.default,
)  # fmt: skip


class Everything(Quantizer):
    """int8 activations in front of and behind every operator, as quantizers for embedded processors annotate:
    weights per channel in [-127, 127], biases int32 at the scale of the accumulator, one scale on both sides
    of a max pool or a view, no scale between a convolution and its relu."""

    activation = QuantizationSpec(
        torch.int8, HistogramObserver.with_args(), quant_min=-128, quant_max=127, qscheme=torch.per_tensor_affine
    )
    weight = QuantizationSpec(
        torch.int8,
        PerChannelMinMaxObserver.with_args(),
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        for node in model.graph.nodes:
            if node.target in _SHARED:
                shared = SharedQuantizationSpec((node.args[0], node))
                self._set(node, {node.args[0]: self.activation}, shared)
            elif node.target in _WEIGHTED:
                self._annotate_weighted(node)
            elif node.target in _CLAMPS and node.args[0].target in (*_WEIGHTED, aten.add.Tensor):
                self._set(node, {}, self.activation)
            elif node.target in _COMPUTING:
                tensors = {n: self.activation for n in node.all_input_nodes if n.op != "get_attr"}
                self._set(node, tensors, None if self._clamped(node) else self.activation)
        return model

    def _annotate_weighted(self, node: fx.Node) -> None:
        x, weight, *bias = node.args[:3]
        inputs: dict[Any, Any] = {x: self.activation, weight: self.weight}
        if bias and bias[0] is not None:
            inputs[bias[0]] = DerivedQuantizationSpec(
                [(x, node), (weight, node)],
                self._bias_scale,
                torch.int32,
                quant_min=-(2**31),
                quant_max=2**31 - 1,
                qscheme=torch.per_channel_symmetric,
                ch_axis=0,
            )
        self._set(node, inputs, None if self._clamped(node) else self.activation)

    @staticmethod
    def _bias_scale(observers: list[Any]) -> tuple[Tensor, Tensor]:
        x, weight = (observer.calculate_qparams()[0] for observer in observers)
        return x * weight, torch.zeros_like(weight, dtype=torch.int64)

    @staticmethod
    def _clamped(node: fx.Node) -> bool:
        return len(node.users) == 1 and next(iter(node.users)).target in _CLAMPS

    @staticmethod
    def _set(node: fx.Node, inputs: dict[Any, Any], output: Any) -> None:
        node.meta["quantization_annotation"] = QuantizationAnnotation(inputs, output, _annotated=True)

    def validate(self, model: fx.GraphModule) -> None:
        pass


def x86(**options: Any) -> Quantizer:
    """uint8 activations in front of convolutions, linears and what lies between them; weights per channel."""
    return X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config(**options))


def arm(**options: Any) -> Quantizer:
    """int8 activations, weights per tensor."""
    return ArmInductorQuantizer().set_global(get_default_arm_inductor_quantization_config(**options))


def convert(
    model: nn.Module,
    quantizer: Quantizer,
    batches: Sequence[Tensor],
    *,
    dynamic_shapes: Any = None,
    **options: Any,
) -> fx.GraphModule:
    """`model` through export, prepare, calibration on `batches` and convert (with `options`)."""
    exported = torch.export.export(model, (batches[0],), dynamic_shapes=dynamic_shapes).module()
    prepared = prepare_pt2e(exported, quantizer)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    converted = convert_pt2e(prepared, **options)
    assert isinstance(converted, fx.GraphModule)
    return converted


def train(model: nn.Module, quantizer: Quantizer, batches: Sequence[Tensor]) -> fx.GraphModule:
    """`model` through quantization-aware training (without a step of it), where batch norm stays until convert."""
    exported = torch.export.export(model.train(), (batches[0],)).module()
    prepared = prepare_qat_pt2e(exported, quantizer)
    with torch.no_grad():
        for batch in batches:
            prepared(batch)
    move_exported_model_to_eval(prepared)
    converted = convert_pt2e(prepared)
    assert isinstance(converted, fx.GraphModule)
    return converted
