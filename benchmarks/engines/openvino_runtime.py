"""OpenVINO: float, and int8 by NNCF's post-training quantization."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import ClassVar

from benchmarks.engines.base import Engine, Source


class OpenVino(Engine):
    """OpenVINO in float32."""

    name = "openvino float"
    loader = "openvino"
    modules: ClassVar[tuple[str, ...]] = ("openvino",)
    packages: ClassVar[tuple[str, ...]] = ("openvino",)

    def prepare(self, source: Source) -> Path:
        import openvino

        path = source.folder / "openvino.xml"
        openvino.save_model(openvino.convert_model(source.onnx), path, compress_to_fp16=False)
        return path

    def files(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".bin")]


class OpenVinoInt8(OpenVino):
    """The network in int8, what NNCF leaves in float32 in float32."""

    name = "openvino int8"
    modules: ClassVar[tuple[str, ...]] = ("nncf", "openvino")
    packages: ClassVar[tuple[str, ...]] = ("openvino", "nncf")

    def prepare(self, source: Source) -> Path:
        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        path, calibration = source.folder / "openvino.int8.xml", source.calibration
        model = openvino.convert_model(source.onnx)
        quantized = nncf.quantize(model, nncf.Dataset(calibration), subset_size=len(calibration))
        openvino.save_model(quantized, path, compress_to_fp16=False)
        return path
