"""The engines that are compared: how each is prepared from the float model, and how it runs.

A prepared model is a file, so that a measuring process loads only its own engine.
"""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
INPUT = "x"


class Engine(ABC):
    """One way to run a network."""

    name: ClassVar[str]

    @abstractmethod
    def prepare(self, onnx: Path, model: Any, calibration: list[Array]) -> Path:
        """Write what `load` reads next to `onnx`, the float model; `model` is its torch module."""

    @abstractmethod
    def load(self, path: Path, threads: int) -> Callable[[Array], Array]:
        """A function from one input (1, 3, height, width) to its logits."""


class Qcompile(Engine):
    """This project, for the machine it runs on."""

    name = "qcompile"

    def prepare(self, onnx: Path, model: Any, calibration: list[Array]) -> Path:
        import torch

        import qcompile

        path = onnx.with_suffix(".qcm")
        qcompile.compile(model, "native", calibration=[torch.from_numpy(x) for x in calibration], strict=True).save(
            path
        )
        return path

    def load(self, path: Path, threads: int) -> Callable[[Array], Array]:
        import qcompile

        return qcompile.load(path, threads=threads)


class OnnxRuntime(Engine):
    """ONNX Runtime in float32."""

    name = "onnxruntime float"

    def prepare(self, onnx: Path, model: Any, calibration: list[Array]) -> Path:
        return onnx

    def load(self, path: Path, threads: int) -> Callable[[Array], Array]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda x: session.run(None, {INPUT: x})[0]


class OnnxRuntimeInt8(OnnxRuntime):
    """ONNX Runtime's static quantization: uint8 activations, int8 weights per channel, min-max."""

    name = "onnxruntime int8"

    def prepare(self, onnx: Path, model: Any, calibration: list[Array]) -> Path:
        from onnxruntime import quantization as ort
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(ort.CalibrationDataReader):  # type: ignore[misc]
            def __init__(self, inputs: Iterable[Array]) -> None:
                self.inputs = iter(inputs)

            def get_next(self) -> dict[str, Array] | None:
                x = next(self.inputs, None)
                return None if x is None else {INPUT: x}

        simplified, path = onnx.with_suffix(".simplified.onnx"), onnx.with_suffix(".int8.onnx")
        quant_pre_process(onnx, simplified)
        ort.quantize_static(
            simplified,
            path,
            Reader(calibration),
            quant_format=ort.QuantFormat.QDQ,
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            calibrate_method=ort.CalibrationMethod.MinMax,
        )
        return path


class OpenVino(Engine):
    """OpenVINO in float32."""

    name = "openvino float"

    def prepare(self, onnx: Path, model: Any, calibration: list[Array]) -> Path:
        import openvino

        path = onnx.with_suffix(".openvino.xml")
        openvino.save_model(openvino.convert_model(onnx), path, compress_to_fp16=False)
        return path

    def load(self, path: Path, threads: int) -> Callable[[Array], Array]:
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
        }
        request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

        def run(x: Array) -> Array:
            request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
            request.infer()
            return request.get_output_tensor().data

        return run


class OpenVinoInt8(OpenVino):
    """OpenVINO with NNCF's post-training quantization."""

    name = "openvino int8"

    def prepare(self, onnx: Path, model: Any, calibration: list[Array]) -> Path:
        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        path = onnx.with_suffix(".openvino.int8.xml")
        quantized = nncf.quantize(openvino.convert_model(onnx), nncf.Dataset(calibration), subset_size=len(calibration))
        openvino.save_model(quantized, path, compress_to_fp16=False)
        return path


ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (Qcompile(), OnnxRuntimeInt8(), OpenVinoInt8(), OnnxRuntime(), OpenVino())
}


def export_onnx(model: Any, example: Array, path: Path) -> None:
    """The float model as ONNX, the common source of all engines but this project's."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter announces its successor
        torch.onnx.export(
            model,
            (torch.from_numpy(example),),
            path,
            input_names=[INPUT],
            output_names=["y"],
            opset_version=17,
            dynamo=False,
        )
