"""CompiledModel: what `compile` returns, an artifact together with the integer program that it was built from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from qcompile.artifact import Artifact
from qcompile.checks import InputChecker, check_seconds
from qcompile.choices import Choices
from qcompile.device import lacks
from qcompile.errors import DeviceError
from qcompile.executable import OWNER, pool_size
from qcompile.ir import Program
from qcompile.profiling import Profile, profile
from qcompile.quantizer import Recipe
from qcompile.runtime import Model
from qcompile.targets import Target
from qcompile.targets.workload import Chosen


class CompiledModel(Model):
    """A compiled model with its integer program: everything that `qcompile.load` gives, and the reference.

    Attributes:
        program: the integer graph.
        recipe: how the program was made of the float model, where that is known.
        choices: the layers that a search left in float, and what it reached; None without one.
    """

    choices: Choices | None = None

    def __init__(
        self,
        artifact: Artifact,
        program: Program,
        target: Target,
        *,
        threads: int | None = None,
        chosen: Chosen | None = None,
        recipe: Recipe | None = None,
    ) -> None:
        self.program, self._built_for, self._chosen, self.recipe = program, target, chosen or {}, recipe
        self._foreign = all(lacks(v.machine, v.features) for v in artifact.variants)
        if self._foreign:  # built for another machine: it can be saved and inspected, not run
            self.artifact, self._variant = artifact, artifact.variants[0]
            self._check = InputChecker(artifact.inputs)
        else:
            super().__init__(artifact, threads=threads)

    def reference(self, *inputs: Any, **named: Any) -> Any:
        """The integer graph in eager PyTorch: called as the model is, gives the same bits, slowly."""
        return self._apply(self._reference, inputs, named)

    def _reference(self, *inputs: np.ndarray) -> list[np.ndarray]:
        # Copies: an array may be read-only, and an output may be an input's own memory.
        outputs = self.program(*[torch.from_numpy(array.copy()) for array in self._check(inputs)])
        return [output.contiguous().numpy() for output in outputs]

    def profile(self, *inputs: Any, seconds: float = 1.0, **named: Any) -> Profile:
        """Time every kernel of a call on `inputs`, for about `seconds` after building once more.

        Returns:
            A `Profile`: prints as a table, and `.plot(path)` draws it.

        Raises:
            InputError: the inputs do not fit. ConfigError: `seconds` is no time. DeviceError: the model was compiled
                for another machine, or for a GPU.
        """
        check_seconds(seconds)
        if self._variant.device_code:
            raise DeviceError(
                f"profile() times the kernels of a processor, and {self.target} is a GPU",
                remedy="profile the GPU with NVIDIA's tools (nsys), or compile the model for 'native'",
            )
        found: list[Profile] = []

        def run(*arrays: np.ndarray) -> list[np.ndarray]:
            outputs = self.flat(*arrays)  # checks the inputs, and sets the number of threads
            threads = self._threads or pool_size()
            measure = partial(
                profile, self.program, self._built_for, self._chosen, self._check(arrays), threads, seconds
            )
            found.append(OWNER.run(measure))
            return outputs

        self._apply(run, inputs, named)
        return found[0]

    def _on_gpu(self, torch_module: Any, inputs: Sequence[Any]) -> list[Any] | None:
        return None if self._foreign else super()._on_gpu(torch_module, inputs)

    def flat(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Flat NumPy inputs to flat NumPy outputs.

        Raises:
            DeviceError: the model was compiled for another machine.
        """
        if self._foreign:
            raise DeviceError(
                f"this model was compiled for {self.target}, which this machine cannot run",
                remedy="save() it and run it on the device, or call .reference(...) here: it gives the same bits",
            )
        return super().flat(*inputs)
