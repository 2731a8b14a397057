"""One linear layer with integer weights and float inputs and outputs: each kind beside ONNX Runtime's and PyTorch's.

    python -m benchmarks.linear [--threads 1 2] [--shapes 1x768x768 ...] [--rounds 9]

Engines are measured in turns, each in a process of its own; a ratio is the median over the rounds of the other's
time divided by ours in that round, so more than 1 says that ours is faster.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.interleave import Racer, interleave, ratio

SHAPES = ("1x768x768", "1x768x3072", "128x768x768", "128x768x3072", "1x4096x4096")
ORT, ORT_DYNAMIC, EAGER = "onnxruntime float", "onnxruntime dynamic int8", "pytorch float"
GROUP = 128
KINDS: dict[str, tuple[dict[str, Any], str]] = {  # ours -> the peer that computes alike
    "dynamic": ({"activations": "dynamic"}, ORT_DYNAMIC),
    "int8 weights": ({"activations": "float"}, ORT),
    "int4 weights": ({"activations": "float", "weight_bits": 4, "group_size": GROUP}, "MatMulNBits"),
}


def prepare(rows: int, features: int, outputs: int, folder: Path) -> dict[str, Path]:
    """Every form of one layer, as files; and its input, x.npy."""
    import torch

    import qcompile

    torch.manual_seed(0)
    layer = torch.nn.Linear(features, outputs).eval()
    x = torch.randn(rows, features)
    np.save(folder / "x.npy", x.numpy())
    exported = torch.export.export(layer, (x,))
    files = {EAGER: folder / "model.pt2", **onnx_files(layer, rows, folder)}
    torch.export.save(exported, files[EAGER])
    for kind, (options, _) in KINDS.items():
        files[kind] = folder / f"{kind}.qcm"
        qcompile.compile(layer, config=qcompile.QuantConfig(**options), example_inputs=(x,)).save(files[kind])
    return files


def onnx_files(layer: Any, rows: int, folder: Path) -> dict[str, Path]:
    """Float, with dynamic quantization, and with 4-bit weights in groups, which ONNX Runtime multiplies in float."""
    import onnx
    from onnx import helper, numpy_helper
    from onnxruntime import quantization as ort

    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    (outputs, features) = weight.shape
    groups = features // GROUP
    grouped = weight.reshape(outputs, groups, GROUP)
    scale = np.abs(grouped).max(2) / 7
    q = (np.rint(grouped / scale[..., None]) + 8).astype(np.uint8)
    packed = q[..., ::2] | q[..., 1::2] << 4
    attributes = {"K": features, "N": outputs, "bits": 4, "block_size": GROUP}

    def save(name: str, node: Any, constants: dict[str, Any], domains: dict[str, int]) -> Path:
        graph = helper.make_graph(
            [node, helper.make_node("Add", ["p", "bias"], ["y"])],
            "linear",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [rows, features])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [rows, outputs])],
            [numpy_helper.from_array(value, key) for key, value in {**constants, "bias": bias}.items()],
        )
        opsets = [helper.make_opsetid(domain, number) for domain, number in domains.items()]
        path = folder / f"{name}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
        return path

    product = helper.make_node("MatMul", ["x", "w"], ["p"])
    nibbles = helper.make_node("MatMulNBits", ["x", "w", "s"], ["p"], domain="com.microsoft", **attributes)
    files = {ORT: save("float", product, {"w": np.ascontiguousarray(weight.T)}, {"": 17})}
    constants = {"w": packed, "s": scale.reshape(-1).astype(np.float32)}
    files["MatMulNBits"] = save("nbits", nibbles, constants, {"": 17, "com.microsoft": 1})
    files[ORT_DYNAMIC] = folder / "dynamic.onnx"
    ort.quantize_dynamic(files[ORT], files[ORT_DYNAMIC], per_channel=True, weight_type=ort.QuantType.QInt8)
    return files


def measure(files: dict[str, Path], threads: int, x: Path, rounds: int) -> list[str]:
    """Per kind: microseconds, how many times the peer's speed, and how many times that of PyTorch's float."""
    cells = []
    for kind, (_, peer) in KINDS.items():
        engines = {"qcompile": kind, EAGER: EAGER, ORT if peer == "MatMulNBits" else peer: peer}
        racers = {engine: Racer(engine, files[file]) for engine, file in engines.items()}
        found, failed = interleave(racers, threads, x, rounds=rounds, max_rounds=2 * rounds, seconds=0.1)
        if failed:
            raise SystemExit(f"{kind}: {failed}")
        ours, *others = found.values()
        eager, other = (ratio(theirs, ours)[0] for theirs in others)
        cells += [f"{1e3 * ours.milliseconds():.1f}", f"{other:.2f}", f"{eager:.2f}"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    heads = [head for kind, (_, peer) in KINDS.items() for head in (f"{kind}, us", f"x {peer}", f"x {EAGER}")]
    table = Table("rows x in x out", "threads", *heads)
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            rows, features, outputs = map(int, shape.split("x"))
            files = prepare(rows, features, outputs, Path(folder))
            for threads in options.threads:
                table.add_row(shape, str(threads), *measure(files, threads, Path(folder, "x.npy"), options.rounds))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
