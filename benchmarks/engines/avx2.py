"""The same engines held to AVX2: ours by its target, ONNX Runtime by hiding what the processor has beyond it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from benchmarks.engines.base import Array, Source
from benchmarks.engines.onnx_runtime import OnnxRuntime, OnnxRuntimeInt8
from benchmarks.engines.ours import Qcompile
from benchmarks.restrict import import_restricted, restrict

CORE = "onnxruntime.capi.onnxruntime_pybind11_state"


class QcompileAvx2(Qcompile):
    """This project, compiled for x86-avx2."""

    name = "qcompile avx2"
    target = "x86-avx2"


class OnnxRuntimeAvx2(OnnxRuntime):
    """ONNX Runtime in float32, on a processor that has nothing beyond AVX2 as far as it can see."""

    name = "onnxruntime float avx2"
    modules: ClassVar[tuple[str, ...]] = ()  # importing it is what has to be done in the restricted way

    def prepare(self, source: Source) -> Path:
        """As without the restriction, once a restricted copy of the library lies beside the model."""
        package = find_spec("onnxruntime")
        assert package is not None
        assert package.submodule_search_locations is not None
        (library,) = Path(package.submodule_search_locations[0], "capi").glob("onnxruntime_pybind11_state*.so")
        import_restricted(CORE, restrict(library, source.folder))
        return super().prepare(source)

    def load(self, path: Path, threads: int) -> Callable[[Array], Array]:
        (copy,) = path.parent.glob("onnxruntime_pybind11_state*.so")
        import_restricted(CORE, copy)
        return super().load(path, threads)


class OnnxRuntimeInt8Avx2(OnnxRuntimeAvx2, OnnxRuntimeInt8):
    """The same int8 model."""

    name = "onnxruntime int8 avx2"
