"""Without quantization: this project in float32 and in bfloat16, and the peers that have bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from benchmarks.engines.base import Source
from benchmarks.engines.inductor import Inductor, compile_ahead
from benchmarks.engines.openvino_runtime import OpenVino
from benchmarks.engines.ours import Qcompile


class QcompileFloat32(Qcompile):
    """This project, `numerics="float32"`."""

    name = "qcompile float32"
    numerics: ClassVar[str] = "float32"

    def prepare(self, source: Source) -> Path:
        import qcompile

        path = source.folder / f"model.{self.numerics}.qcm"
        qcompile.compile(source.program, self.target, numerics=self.numerics).save(path)
        return path


class QcompileBfloat16(QcompileFloat32):
    """This project, `numerics="bfloat16"`."""

    name = "qcompile bfloat16"
    numerics = "bfloat16"


class OpenVinoBfloat16(OpenVino):
    """The float model with the inference precision hint bf16."""

    name = "openvino bfloat16"
    loader = "openvino_bfloat16"


class InductorBfloat16(Inductor):
    """Inductor, the model and its input converted to bfloat16."""

    name = "inductor bfloat16"

    def prepare(self, source: Source) -> Path:
        import torch

        class Converted(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = source.program.module().to(torch.bfloat16)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.model(x.to(torch.bfloat16)).to(torch.float32)

        example = tuple(source.program.example_inputs[0])
        with torch.no_grad():
            exported = torch.export.export(Converted(), example)
        return compile_ahead(exported, source.folder / "inductor.bfloat16.pt2")
