"""How each engine is loaded and called. Importing this imports nothing: what a cold start costs is the engine's own.

Each takes the path of a prepared model and the number of threads, and returns a function from one input, as
`Engine.arrange` gives it, to its logits.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.engines.base import Array


def qcompile(path: str, threads: int) -> Callable[[Array], Array]:
    import qcompile

    return qcompile.load(path, threads=threads)


def litert(path: str, threads: int) -> Callable[[Array], Array]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(path, num_threads=threads)
    interpreter.allocate_tensors()
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(x: Array) -> Array:
        interpreter.set_tensor(taken["index"], x)
        interpreter.invoke()
        return interpreter.get_tensor(given["index"])

    return run


def onnxruntime(path: str, threads: int) -> Callable[[Array], Array]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    name = taken.name
    return lambda x: session.run(None, {name: x})[0]


def openvino(path: str, threads: int, precision: str = "f32") -> Callable[[Array], Array]:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def run(x: Array) -> Array:
        request.set_input_tensor(openvino.Tensor(x, shared_memory=True))
        request.infer()
        return request.get_output_tensor().data

    return run


def openvino_bfloat16(path: str, threads: int) -> Callable[[Array], Array]:
    return openvino(path, threads, "bf16")


def inductor(path: str, threads: int) -> Callable[[Array], Array]:
    import torch
    from torch._inductor import aoti_load_package

    torch.set_num_threads(threads)
    compiled = aoti_load_package(path)

    def run(x: Array) -> Array:
        return compiled(torch.from_numpy(x)).numpy()

    return run


def eager(path: str, threads: int) -> Callable[[Array], Array]:
    import torch

    torch.set_num_threads(threads)
    model = torch.export.load(path).module()

    def run(x: Array) -> Array:
        with torch.no_grad():
            return model(torch.from_numpy(x)).numpy()

    return run
