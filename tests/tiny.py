"""The smallest real artifact: y = x @ w.T + b in int8, any batch of 1 to 8, built by TVM directly."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from qcompile.artifact import Artifact, CoverageRow, Golden, PassRow, TensorSpec, Variant

K, N = 64, 32

TARGETS: dict[str, tuple[str, tuple[str, ...], dict[str, Any], str]] = {
    "x86-avx2": ("x86_64", ("avx2", "fma"), {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "haswell"}, "ld"),
    "arm64-dotprod": (
        "aarch64",
        ("asimd", "asimddp"),
        {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+v8.2a", "+dotprod"]},
        "aarch64-linux-gnu-ld",
    ),
}


@I.ir_module
class _Module:
    @T.prim_func
    def matmul(x: T.handle, w: T.Buffer((N, K), "int8"), b: T.Buffer((N,), "int32"), y: T.handle):  # type: ignore[no-untyped-def, valid-type]
        n = T.int64()
        X = T.match_buffer(x, (n, K), "int8")
        Y = T.match_buffer(y, (n, N), "int32")
        T.func_attr({"global_symbol": "matmul", "tirx.noalias": True})
        for i in T.parallel(n):
            for j in T.serial(N):
                Y[i, j] = b[j]
                for k in T.serial(K):
                    Y[i, j] = Y[i, j] + T.cast(X[i, k], "int32") * T.cast(w[j, k], "int32")

    @R.function
    def main(x: R.Tensor(("n", K), "int8"), constants: R.Tuple(R.Tensor((N, K), "int8"), R.Tensor((N,), "int32"))):  # type: ignore[no-untyped-def, valid-type]
        n = T.int64()
        cls = _Module
        with R.dataflow():
            w = constants[0]
            b = constants[1]
            y = R.call_tir(cls.matmul, (x, w, b), out_ty=R.Tensor((n, N), "int32"))
            z = R.reshape(x, (n, K))  # an output that is the input's own memory
            R.output(y, z, b)
        return (y, z, b)


@cache
def library(target: str) -> bytes:
    """The machine code for `target`."""
    _, _, description, linker = TARGETS[target]

    def link(output: str, objects: list[str], options: object = None, **_: object) -> None:
        subprocess.run([linker, "-shared", "-o", output, *objects], check=True)

    link.object_format = "o"  # type: ignore[attr-defined]
    executable = relax.build(_Module, tvm.target.Target(description), exec_mode="compiled")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "library.so")
        executable.export_library(str(path), fcompile=link)
        return path.read_bytes()


WEIGHT = np.random.default_rng(1).integers(-127, 128, (N, K), dtype=np.int8)
BIAS = np.random.default_rng(2).integers(-999, 1000, N, dtype=np.int32)


def random_input(batch: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-128, 128, (batch, K), dtype=np.int8)


def expected(x: np.ndarray) -> np.ndarray:
    return np.asarray(x.astype(np.int32) @ WEIGHT.T.astype(np.int32) + BIAS)


def artifact(*targets: str) -> Artifact:
    """A model for `targets`; returns {"y": x @ w.T + b, "rest": (x, b)}."""
    batch = ("batch", 1, 8)
    x = random_input(3, seed=7)
    return Artifact(
        inputs=(TensorSpec("x", (batch, K), "int8"),),
        outputs=(
            TensorSpec("y", (batch, N), "int32"),
            TensorSpec("z", (batch, K), "int8", scale=0.5, zero_point=-3),
            TensorSpec("b", (N,), "int32"),
        ),
        output_structure={"dict": {"y": 0, "rest": {"tuple": [1, 2]}}},
        variants=tuple(
            Variant(name, *TARGETS[name][:2], rank, library(name), {"w": WEIGHT, "b": BIAS})
            for rank, name in enumerate(targets)
        ),
        coverage=(
            CoverageRow("aten.linear.default", "linear", "integer", "gemm", where="head"),
            CoverageRow("aten.view.default", "view", "float", "", reason="a reason to stay float"),
        ),
        passes=(PassRow("canonicalize", True, 3, 2),),
        toolchain={"apache-tvm": str(tvm.__version__)},
        golden=(Golden((x,), (expected(x), x, BIAS)),),
    )


HAS_ARM_LINKER = shutil.which(TARGETS["arm64-dotprod"][3]) is not None
