"""ONNX Runtime: float, and quantized by its own tools with static or with dynamic ranges."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from benchmarks.engines.base import INPUT, Array, Engine, Source


class OnnxRuntime(Engine):
    """ONNX Runtime in float32."""

    name = "onnxruntime float"
    loader = "onnxruntime"
    modules: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    packages: ClassVar[tuple[str, ...]] = ("onnxruntime",)

    def prepare(self, source: Source) -> Path:
        return source.onnx


class OnnxRuntimeInt8(OnnxRuntime):
    """Static quantization: uint8 activations (on x86 far faster than int8), int8 weights per channel, min-max."""

    name = "onnxruntime int8"
    modules: ClassVar[tuple[str, ...]] = ("onnxruntime.quantization.shape_inference",)

    def prepare(self, source: Source) -> Path:
        from onnxruntime import quantization as ort

        class Reader(ort.CalibrationDataReader):
            def __init__(self, inputs: Iterable[Array]) -> None:
                self.inputs = iter(inputs)

            def get_next(self) -> dict[str, Array] | None:
                x = next(self.inputs, None)
                return None if x is None else {INPUT: x}

        path = source.folder / "model.int8.onnx"
        ort.quantize_static(
            _simplified(source),
            path,
            Reader(source.calibration),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=ort.CalibrationMethod.MinMax,
        )
        return path


class OnnxRuntimeDynamic(OnnxRuntime):
    """Dynamic quantization: int8 weights per channel, activations quantized by their range in each call."""

    name = "onnxruntime dynamic int8"
    modules: ClassVar[tuple[str, ...]] = ("onnxruntime.quantization.shape_inference",)

    def objection(self, model: str) -> str | None:
        return None if model == "mlp" else "dynamic quantization is for matrix products: it has no fast convolution"

    def prepare(self, source: Source) -> Path:
        from onnxruntime import quantization as ort

        path = source.folder / "model.dynamic.onnx"
        ort.quantize_dynamic(_simplified(source), path, per_channel=True, weight_type=ort.QuantType.QInt8)
        return path


def _simplified(source: Source) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = source.folder / "model.simplified.onnx"
    quant_pre_process(source.onnx, path)
    return path
