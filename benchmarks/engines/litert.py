"""LiteRT (the TensorFlow Lite interpreter with XNNPACK), int8 by its own quantizer.

Its converter and its quantizer pin packages of their own, so they live in an environment of their own
(`make .venv-litert/installed`). Images are converted channels last, and come to the interpreter so.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.engines.base import ROOT, Array, Engine, Source


class LiteRtInt8(Engine):
    """Static: int8 activations, int8 weights per channel; float32 inputs and outputs, as every engine here."""

    name = "litert int8"
    loader = "litert"
    modules = ("litert_torch", "ai_edge_quantizer.quantizer", "ai_edge_litert.interpreter")
    packages = ("ai-edge-litert", "ai-edge-quantizer", "litert-torch")
    from_torch = True

    @property
    def python(self) -> Path:
        return ROOT / ".venv-litert" / "bin" / "python"

    def prepare(self, source: Source) -> Path:
        import litert_torch
        import torch
        from ai_edge_litert.interpreter import Interpreter
        from ai_edge_quantizer import quantizer, recipe
        from ai_edge_quantizer.qtyping import TFLOperationName

        float_path, path = source.folder / "model.tflite", source.folder / "model.int8.tflite"
        module, batches = source.program.module(), [self.arrange(x) for x in source.calibration]
        if batches[0].ndim == 4:
            module = litert_torch.to_channel_last_io(module, args=[0])
        with torch.no_grad():
            litert_torch.convert(module, (torch.from_numpy(batches[0]),)).export(str(float_path))
        quantize = quantizer.Quantizer(str(float_path))
        quantize.load_quantization_recipe(recipe.static_wi8_ai8())
        for end in (TFLOperationName.INPUT, TFLOperationName.OUTPUT):
            quantize.update_quantization_recipe(".*", end, algorithm_key="no_quantize")
        ((signature, names),) = Interpreter(str(float_path)).get_signature_list().items()
        (name,) = names["inputs"]
        measured = quantize.calibrate({signature: [{name: x} for x in batches]})
        quantize.quantize(measured).export_model(str(path))
        return path

    def arrange(self, x: Array) -> Array:
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x
