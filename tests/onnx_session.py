"""Runs exported models with ONNX Runtime, on one thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from qcompile.export import to_onnx
from qcompile.export.writer import Activations


class Session:
    """ONNX Runtime on what `to_onnx` makes of a model; `fused`: with all its rewrites, else node by node."""

    def __init__(self, model: Any, *, fused: bool = True, activations: Activations = "int8") -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if fused else level.ORT_DISABLE_ALL
        self.model = to_onnx(model, activations=activations)
        self.session = onnxruntime.InferenceSession(self.model.SerializeToString(), options)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        names = [given.name for given in self.session.get_inputs()]
        arrays = {name: np.ascontiguousarray(x.numpy()) for name, x in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(np.asarray(y)) for y in self.session.run(None, arrays))

    def first(self, batches: Sequence[Tensor]) -> Tensor:
        """The first output of every batch, joined."""
        return torch.cat([self(x)[0] for x in batches])
