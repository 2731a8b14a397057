"""PyTorch's inductor: the float model, and the model quantized by torchao for inductor's int8 kernels.

Compiled ahead of time (AOTInductor) to a package, with frozen weights; the number of threads is
chosen when it runs. It needs a C++ compiler.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.engines.base import Engine, Source


class Inductor(Engine):
    """Inductor in float32."""

    name = "inductor float"
    loader = "inductor"
    modules: ClassVar[tuple[str, ...]] = ("torch._inductor",)
    packages: ClassVar[tuple[str, ...]] = ("torch",)
    from_torch = True

    def objection(self, model: str) -> str | None:
        return None if shutil.which("g++") else "inductor needs a C++ compiler, and there is no g++"

    def prepare(self, source: Source) -> Path:
        return compile_ahead(source.program, source.folder / "inductor.pt2")


class InductorInt8(Inductor):
    """torchao's static PT2E quantization with its X86InductorQuantizer."""

    name = "inductor int8"
    modules: ClassVar[tuple[str, ...]] = (
        "torch._inductor",
        "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer",
    )
    packages: ClassVar[tuple[str, ...]] = ("torch", "torchao")

    def prepare(self, source: Source) -> Path:
        import torch
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        quantizer = x86.X86InductorQuantizer()
        quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
        example = tuple(source.program.example_inputs[0])
        with torch.no_grad():
            observed = prepare_pt2e(source.program.module(), quantizer)
            for x in source.calibration:
                observed(torch.from_numpy(x))
            quantized = convert_pt2e(observed)
            _refuse_float(quantized)
            return compile_ahead(torch.export.export(quantized, example), source.folder / "inductor.int8.pt2")


def _refuse_float(quantized: Any) -> None:
    """The quantizer skips what it does not recognise and says nothing: a model it left in float is no int8 figure."""
    weighted = [n for n in quantized.graph.nodes if str(n.target) in ("aten.conv2d.default", "aten.linear.default")]
    integer = [n for n in weighted if "dequantize_per_channel" in str(n.args[1].target)]
    if 2 * len(integer) < len(weighted):
        found = f"{len(integer)} of {len(weighted)} convolutions and linear layers"
        raise RuntimeError(f"X86InductorQuantizer quantized only {found}")


def compile_ahead(program: Any, path: Path) -> Path:
    """Write the package of an exported program to `path`."""
    from torch._inductor import aoti_compile_and_package, config

    with config.patch({"freezing": True, "cpp.dynamic_threads": True}):
        aoti_compile_and_package(program, package_path=str(path))
    return path
