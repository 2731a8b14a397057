"""Write an integer program in another format: ONNX."""

from qcompile.export.model import export_onnx, to_onnx

__all__ = ["export_onnx", "to_onnx"]
