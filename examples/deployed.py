"""What runs on the device: load an artifact, answer the inputs of one file into another.

    python deployed.py model.qcm inputs.npy outputs.npy

Imports neither PyTorch nor the compiler, and makes sure of it.
"""

import sys

import numpy as np

import qcompile


def main(model_path: str, inputs_path: str, outputs_path: str) -> None:
    model = qcompile.load(model_path)
    inputs = np.load(inputs_path)
    np.save(outputs_path, np.concatenate([model(inputs[i : i + 1]) for i in range(len(inputs))]))
    assert not {"torch", "tvm"} & set(sys.modules), "a deployed process must not load PyTorch or the compiler"
    print(f"{len(inputs)} answers; loaded without PyTorch and without the compiler")


if __name__ == "__main__":
    main(*sys.argv[1:])
