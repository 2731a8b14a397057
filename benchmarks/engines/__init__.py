"""The engines that are compared, by name. Importing this loads none of them."""

from __future__ import annotations

from benchmarks.engines.avx2 import OnnxRuntimeAvx2, OnnxRuntimeInt8Avx2, QcompileAvx2
from benchmarks.engines.base import Array, Engine, Source
from benchmarks.engines.eager import Eager
from benchmarks.engines.floats import InductorBfloat16, OpenVinoBfloat16, QcompileBfloat16, QcompileFloat32
from benchmarks.engines.inductor import Inductor, InductorInt8
from benchmarks.engines.litert import LiteRtInt8
from benchmarks.engines.onnx_runtime import OnnxRuntime, OnnxRuntimeDynamic, OnnxRuntimeInt8
from benchmarks.engines.openvino_runtime import OpenVino, OpenVinoInt8
from benchmarks.engines.ours import Qcompile, QcompileNormalizing, QcompileUntuned

__all__ = ["AVX2", "ENGINES", "FLOATS", "OURS", "UNRESTRICTED", "UNTUNED", "Array", "Engine", "Source"]

OURS, UNTUNED = Qcompile.name, QcompileUntuned.name
_UNRESTRICTED: tuple[Engine, ...] = (
    Qcompile(),
    QcompileUntuned(),
    OpenVinoInt8(),
    LiteRtInt8(),
    OnnxRuntimeInt8(),
    OnnxRuntimeDynamic(),
    InductorInt8(),
    OpenVino(),
    OnnxRuntime(),
    Inductor(),
)
_AVX2: tuple[Engine, ...] = (QcompileAvx2(), OnnxRuntimeInt8Avx2(), OnnxRuntimeAvx2())
_FLOATS: tuple[Engine, ...] = (
    QcompileFloat32(),
    QcompileBfloat16(),
    OpenVinoBfloat16(),
    InductorBfloat16(),
    OpenVino(),
    OnnxRuntime(),
    Inductor(),
)
ENGINES = {engine.name: engine for engine in (*_UNRESTRICTED, *_AVX2, *_FLOATS, Eager(), QcompileNormalizing())}
UNRESTRICTED, AVX2, FLOATS = ([engine.name for engine in engines] for engines in (_UNRESTRICTED, _AVX2, _FLOATS))
