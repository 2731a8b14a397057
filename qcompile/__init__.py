"""qcompile: compile a PyTorch model to exact int8 machine code, and run it without PyTorch.

    compiled = qcompile.compile(model, calibration=images)   # float model in, int8 code out
    compiled.save("model.qcm")
    deployed = qcompile.load("model.qcm")                     # on the device: no torch, no compiler

The public names are imported on first use, so that `import qcompile` (and with it a deployed
process) loads neither PyTorch nor TVM.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile import passes as passes
    from qcompile import targets as targets
    from qcompile.compiled import CompiledModel as CompiledModel
    from qcompile.compiler import compile as compile
    from qcompile.config import QuantConfig as QuantConfig
    from qcompile.errors import QcompileError as QcompileError
    from qcompile.evaluation import diagnose as diagnose
    from qcompile.evaluation import evaluate as evaluate
    from qcompile.export.model import export_onnx as export_onnx
    from qcompile.qat import QatModel as QatModel
    from qcompile.quantizer import QuantizedModel as QuantizedModel
    from qcompile.quantizer import quantize as quantize
    from qcompile.runtime import load as load
    from qcompile.training import prepare_qat as prepare_qat
    from qcompile.tuning import Tuning as Tuning

__version__ = "0.1.0"

_HOME = {
    "CompiledModel": "qcompile.compiled",
    "QatModel": "qcompile.qat",
    "QcompileError": "qcompile.errors",
    "QuantConfig": "qcompile.config",
    "QuantizedModel": "qcompile.quantizer",
    "Tuning": "qcompile.tuning",
    "compile": "qcompile.compiler",
    "diagnose": "qcompile.evaluation",
    "evaluate": "qcompile.evaluation",
    "export_onnx": "qcompile.export.model",
    "load": "qcompile.runtime",
    "prepare_qat": "qcompile.training",
    "quantize": "qcompile.quantizer",
}
_SUBPACKAGES = ("passes", "targets")

__all__ = [
    "CompiledModel",
    "QatModel",
    "QcompileError",
    "QuantConfig",
    "QuantizedModel",
    "Tuning",
    "compile",
    "diagnose",
    "evaluate",
    "export_onnx",
    "load",
    "passes",
    "prepare_qat",
    "quantize",
    "targets",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return import_module(f"qcompile.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'qcompile' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value  # once; this also wins over a submodule of the same name
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
