"""How TVM lowers the functions of a module to what its code generator takes: the functions in parts, a core for each.

TVM's own pipeline does all functions one after the other, with passes for GPUs among them. These are the passes of its
s_tir pipeline that a CPU needs, in its order; the machine code is the same.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.tirx.compilation_pipeline import register_tir_pipeline

from qcompile.device import cores

NAME = "qcompile"
_S_TIR, _TIRX = s_tir.transform, tirx.transform


def _of_each() -> list[Any]:
    """Passes that look at one function at a time."""
    return [
        _S_TIR.CanonicalizeLoop(),
        _S_TIR.LowerInitBlock(),
        _S_TIR.PlanAndUpdateBufferAllocationLocation(),
        _S_TIR.ConvertBlocksToOpaque(),
        _S_TIR.CompactBufferAllocation(),
        _S_TIR.LowerMatchBuffer(),
        _S_TIR.StmtSimplify(),
        _S_TIR.AnnotateIrregularLoop(),
        _S_TIR.LowerOpaqueBlock(),
        _TIRX.FlattenBuffer(),
        _TIRX.BF16ComputeLegalize(),
        _TIRX.NarrowDataType(32),
        _S_TIR.LoopPartition(),
        _TIRX.VectorizeLoop(True),
        _TIRX.StorageRewrite(),
        _S_TIR.HoistIfThenElse(),
        _TIRX.UnrollLoop(),
        _S_TIR.RenormalizeSplitPattern(),
        _TIRX.StmtSimplify(),
        _TIRX.RemoveNoOp(),
        _S_TIR.RewriteUnsafeSelect(),
        _TIRX.CommonSubexprElim(),
        _TIRX.VerifyMemory(),
    ]


def _of_all() -> list[Any]:
    """Passes that see which functions call which."""
    return [
        _TIRX.AnnotateEntryFunc(),
        _TIRX.SplitHostDevice(),
        _TIRX.MakePackedAPI(),
        _TIRX.BF16StorageLegalize(),
    ]


@tvm.transform.module_pass(opt_level=0, name="LowerInParts")
def _lower(module: tvm.IRModule, _: Any) -> tvm.IRModule:
    count = min(cores(), len(module.functions))
    functions = sorted(module.functions.items(), key=lambda item: str(item[0].name_hint))
    parts = [tvm.IRModule(dict(functions[i::count]), attrs=module.attrs) for i in range(count)]
    with ThreadPoolExecutor(count) as threads:  # TVM lets go of Python's lock while it works
        done = list(threads.map(lambda part: tvm.transform.Sequential(_of_each())(part), parts))
    whole = {name: function for part in done for name, function in part.functions.items()}
    return tvm.transform.Sequential(_of_all())(tvm.IRModule(whole, attrs=module.attrs))


register_tir_pipeline(
    NAME, lambda: (_lower, s_tir.pipeline.finalize_host_passes, s_tir.pipeline.finalize_device_passes)
)
