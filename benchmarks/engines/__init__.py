"""The engines that are compared, by name. Importing this loads none of them."""

from __future__ import annotations

from benchmarks.engines.base import Array, Engine, Source
from benchmarks.engines.inductor import Inductor, InductorInt8
from benchmarks.engines.litert import LiteRtInt8
from benchmarks.engines.onnx_runtime import OnnxRuntime, OnnxRuntimeDynamic, OnnxRuntimeInt8
from benchmarks.engines.openvino_runtime import OpenVino, OpenVinoInt8
from benchmarks.engines.ours import Qcompile

__all__ = ["ENGINES", "OURS", "Array", "Engine", "Source"]

OURS = Qcompile.name
ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Qcompile(),
        OpenVinoInt8(),
        LiteRtInt8(),
        OnnxRuntimeInt8(),
        OnnxRuntimeDynamic(),
        InductorInt8(),
        OpenVino(),
        OnnxRuntime(),
        Inductor(),
    )
}
