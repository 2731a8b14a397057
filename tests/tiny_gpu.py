"""The smallest artifacts for a GPU, built by TVM directly; their kernels are compiled for the emulated one.

`artifact` is that of `tiny`: y = x @ w.T + b in int8, any batch of 1 to 8. `chain` is four kernels after one another of
static shape, of which the inner ones become a graph of CUDA's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import cuda_emulator
import numpy as np
import tiny
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from qcompile.artifact import Artifact, Golden, TensorSpec, Variant
from qcompile.targets.build import link
from qcompile.targets.pipeline import NAME

K, N = tiny.K, tiny.N
ROWS = 96
KERNELS = """
#include "instructions.cuh"
using namespace qcompile;

extern "C" __global__ void matmul(const int8_t* x, const int8_t* w, const int32_t* b, int32_t* y, int n, float one) {
  int row = block_x(), column = thread();
  if (row >= n) return;
  int sum = b[column] * int(one);
  for (int k = 0; k < 64; k++) sum += x[row * 64 + k] * w[column * 64 + k];
  y[row * 32 + column] = sum;
}

extern "C" __global__ void step(const int8_t* x, const int8_t* w, int8_t* y, int n) {
  int8_t* kept = reinterpret_cast<int8_t*>(shared_memory());
  int i = block_x() * threads() + thread();
  kept[thread()] = i < n ? x[i] : 0;
  barrier();
  if (i < n) y[i] = int8_t(kept[thread()] * 3 + w[i]);
}
"""
TAGS = ["blockIdx.x", "threadIdx.x"]
TABLE = {
    "matmul": {"name": "", "arg_types": [*["handle"] * 4, "int32", "float32"], "launch_param_tags": TAGS},
    "step": {
        "name": "",
        "arg_types": [*["handle"] * 3, "int32"],
        "launch_param_tags": [*TAGS, "tirx.use_dyn_shared_memory"],
    },
}


@I.ir_module
class _Matmul:
    @T.prim_func
    def run(x: T.handle, w: T.Buffer((N, K), "int8"), b: T.Buffer((N,), "int32"), y: T.handle):  # type: ignore[no-untyped-def, valid-type]
        n = T.int64()
        X = T.match_buffer(x, (n, K), "int8")
        Y = T.match_buffer(y, (n, N), "int32")
        T.func_attr({"global_symbol": "run", "tirx.noalias": True})
        T.evaluate(
            T.call_packed("matmul", X.data, w.data, b.data, Y.data, T.cast(n, "int32"), T.float32(1), n, T.int32(N))
        )

    @R.function
    def main(x: R.Tensor(("n", K), "int8"), constants: R.Tuple(R.Tensor((N, K), "int8"), R.Tensor((N,), "int32"))):  # type: ignore[no-untyped-def, valid-type]
        n = T.int64()
        cls = _Matmul
        R.func_attr({"num_input": 1})
        with R.dataflow():
            w = constants[0]
            b = constants[1]
            y = R.call_tir(cls.run, (x, w, b), out_ty=R.Tensor((n, N), "int32"))
            z = R.reshape(x, (n, K))  # an output that is the input's own memory
            R.output(y, z, b)
        return (y, z, b)


@I.ir_module
class _Chain:
    @T.prim_func
    def run(x: T.Buffer((ROWS,), "int8"), w: T.Buffer((ROWS,), "int8"), y: T.Buffer((ROWS,), "int8")):  # type: ignore[no-untyped-def, valid-type]
        T.func_attr({"global_symbol": "run", "tirx.noalias": True})
        T.evaluate(T.call_packed("step", x.data, w.data, y.data, T.int32(ROWS), T.int32(3), T.int32(32), T.int32(32)))

    @R.function
    def main(x: R.Tensor((ROWS,), "int8"), constants: R.Tuple(R.Tensor((ROWS,), "int8"))):  # type: ignore[no-untyped-def, valid-type]
        cls = _Chain
        R.func_attr({"num_input": 1})
        with R.dataflow():
            w = constants[0]
            a = R.call_tir(cls.run, (x, w), out_ty=R.Tensor((ROWS,), "int8"))
            b = R.call_tir(cls.run, (a, w), out_ty=R.Tensor((ROWS,), "int8"))
            square = R.reshape(b, (8, 12))
            flat = R.reshape(square, (ROWS,))
            c = R.call_tir(cls.run, (flat, w), out_ty=R.Tensor((ROWS,), "int8"))
            d = R.call_tir(cls.run, (c, w), out_ty=R.Tensor((ROWS,), "int8"))
            y = R.reshape(d, (12, 8))
            R.output(y)
        return y


def _passes() -> list[Any]:
    t = relax.transform
    return [
        t.LegalizeOps({"relax.reshape": lambda builder, call: call}),  # a view, not a kernel that copies
        t.ToNonDataflow(),
        t.RemovePurityChecking(),
        t.CallTIRRewrite(),
        t.StaticPlanBlockMemory(),
        t.RewriteCUDAGraph(),
        t.LowerAllocTensor(),
        t.KillAfterLastUse(),
        t.LowerRuntimeBuiltin(),
        t.ComputePrimValue(),
        t.VMShapeLower(),
        t.AttachGlobalSymbol(),
    ]


@cache
def _library(module: tvm.IRModule) -> bytes:
    host = {"kind": "llvm", "mtriple": "x86_64-linux-gnu"}
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_80", "host": host})
    with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        pipeline = tvm.transform.Sequential(_passes())
        executable = relax.build(module, target, relax_pipeline=pipeline, tir_pipeline=NAME, exec_mode="compiled")
    with tempfile.TemporaryDirectory() as folder:
        link(executable, Path(folder, "library.so"), "ld")
        return Path(folder, "library.so").read_bytes()


def _variant(module: tvm.IRModule, constants: dict[str, np.ndarray]) -> Variant:
    code = cuda_emulator.compile_device(KERNELS, list(TABLE), include=())
    table = json.dumps({"tvm_version": str(tvm.__version__), "func_info": TABLE})
    return Variant("cuda-sm_80", "x86_64", ("sm_80",), 100, _library(module), constants, code, table)


def artifact() -> Artifact:
    """That of `tiny.artifact`, for a GPU."""
    return tiny.artifact("x86-avx2")._replace(variants=(_variant(_Matmul, {"w": tiny.WEIGHT, "b": tiny.BIAS}),))


CHAIN_WEIGHT = np.random.default_rng(3).integers(-128, 128, ROWS, dtype=np.int8)


def chain() -> Artifact:
    """Four steps y = 3 * x + w, modulo 256."""
    x = np.random.default_rng(4).integers(-128, 128, ROWS, dtype=np.int8)
    y = x
    for _ in range(4):
        y = y * np.int8(3) + CHAIN_WEIGHT
    return Artifact(
        inputs=(TensorSpec("x", (ROWS,), "int8"),),
        outputs=(TensorSpec("y", (12, 8), "int8"),),
        output_structure=0,
        variants=(_variant(_Chain, {"w": CHAIN_WEIGHT}),),
        golden=(Golden((x,), (y.reshape(12, 8),)),),
    )


def python(artifact: Artifact, code: str, capability: str = "80", **environment: str) -> str:
    """Run `code` in a process that finds the emulated GPU, with the path of the saved artifact; what it printed."""
    given = {"LD_LIBRARY_PATH": str(cuda_emulator.libraries()), "QCOMPILE_EMULATED_SM": capability, **environment}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.qcm")
        artifact.save(path)
        command = [sys.executable, "-c", code, str(path)]
        done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout
