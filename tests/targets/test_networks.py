"""Whole networks on every target: the machine code gives the bits of the integer graph in eager PyTorch."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from arm import ArmMachine
from execution import ARM, CUDA, TARGETS, X86, artifact_of, different, quick, run_on, skip_unless_runnable
from gpu_machine import REAL, compiling
from gpu_table import record
from networks import FULL, REDUCED, Network, images
from torch import Tensor, fx

from qcompile.artifact import Artifact
from qcompile.compiled import CompiledModel
from qcompile.compiler import compile_program
from qcompile.quantizer import QuantizedModel, quantize
from qcompile.targets import get
from qcompile.targets.capability import objection

reduced = pytest.mark.parametrize("network", REDUCED, ids=str)


@cache
def quantized(network: Network) -> QuantizedModel:
    """One integer program for all targets: what a target refuses would stay float, and strict forbids that."""
    return quantize(network.model(), calibration=network.calibration(), objection=objection(get(TARGETS[0])))


@cache
def answers(network: Network) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
    """Two inputs that calibration has not seen, and what the integer graph says to them."""
    inputs = images(2, network.size, seed=7).split(1)
    return [(x, quantized(network).program(x)) for x in inputs]


def artifact_for(network: Network, target: str) -> Artifact:
    """Refused where an operator stayed float."""
    with compiling():
        return compile_program(quantized(network), get(target), strict=True).artifact


def mismatching(network: Network, target: str, request: pytest.FixtureRequest) -> int:
    """How many elements of the outputs differ from the reference, over two inputs."""
    skip_unless_runnable(target)
    outputs = run_on(artifact_for(network, target), [[x] for x, _ in answers(network)], request)
    wrong = 0
    for got, (_, wants) in zip(outputs, answers(network), strict=True):
        for array, want in zip(got, wants, strict=True):
            wrong += (count := different(array, want))
            record(request.node, count, want.numel())
    return wrong


class Distinct(fx.Interpreter):
    """Runs a graph and keeps how many different values every int8 activation has."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.counts: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.dtype is torch.int8 and n.op == "call_function":
            self.counts[n.name] = len(value.unique())
        return value


@reduced
def test_a_network_is_alive_throughout(network: Network) -> None:
    """A constant activation would make every comparison behind it an empty one."""
    interpreter = Distinct(quantized(network).program.graph_module)
    interpreter.run(images(1, network.size, seed=7))
    assert min(interpreter.counts.values()) > 16
    (_, (first,)), (_, (second,)) = answers(network)
    assert not torch.equal(first, second)


def _reduced() -> list[Any]:
    """Every target with every network; of those for GPUs, long to compile, `make test` has two."""
    usual = {("resnet18", "cuda-sm_61"), ("mobilenetv2", "cuda-sm_80")}
    return [
        pytest.param(
            network,
            *target.values,
            marks=[
                *target.marks,
                *[pytest.mark.slow] * (target.values[0] in CUDA and (network.name, *target.values) not in usual),
            ],
        )
        for network in REDUCED
        for target in quick(TARGETS)
    ]


@pytest.mark.parametrize(("network", "target"), _reduced(), ids=str)
def test_a_network_gives_the_bits_of_its_reference(
    network: Network, target: str, request: pytest.FixtureRequest
) -> None:
    assert mismatching(network, target, request) == 0


def _full() -> list[Any]:
    """Every target with every network; one for a GPU that is emulated takes smaller images."""
    pairs = [(network, target) for network in FULL for target in quick(TARGETS)]
    return [
        pytest.param(
            replace(network, size=64) if target.values[0] in CUDA and not REAL else network,
            *target.values,
            marks=target.marks,
        )
        for network, target in pairs
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("network", "target"), _full(), ids=str)
def test_a_network_of_full_size_gives_the_bits_of_its_reference(
    network: Network, target: str, request: pytest.FixtureRequest
) -> None:
    assert mismatching(network, target, request) == 0


@pytest.mark.parametrize("target", ARM)
def test_a_network_passes_its_own_test_on_the_device(target: str, arm_machine: ArmMachine) -> None:
    """The golden vectors in the artifact, replayed on a machine without PyTorch and without a compiler."""
    result = arm_machine.selftest(artifact_for(REDUCED[0], target))
    assert result.passed
    assert (result.cases, result.elements) == (2, 2000)


@pytest.mark.parametrize("target", quick(X86))
def test_the_number_of_threads_changes_no_bit(target: str) -> None:
    skip_unless_runnable(target)
    artifact = artifact_for(REDUCED[0], target)
    for threads in (1, None):  # None: all cores
        model = CompiledModel(artifact, quantized(REDUCED[0]).program, get(target), threads=threads)
        assert [different(model(x).numpy(), want) for x, (want,) in answers(REDUCED[0])] == [0, 0]


@pytest.mark.parametrize("target", quick(CUDA, gpus=("cuda-sm_80",)))
def test_a_network_for_a_gpu_takes_every_batch(target: str, request: pytest.FixtureRequest) -> None:
    """Also where a grid of blocks depends on it."""
    skip_unless_runnable(target)
    network, batch = REDUCED[0], torch.export.Dim("batch", min=1, max=8)
    dynamic = quantize(network.model(), calibration=network.calibration(), dynamic_shapes=({0: batch},))
    cases = [[images(size, network.size, seed=8)] for size in (1, 5, 2)]
    outputs = run_on(artifact_of(dynamic.program, get(target)), cases, request)
    for got, inputs in zip(outputs, cases, strict=True):
        (want,) = dynamic.program(*inputs)
        record(request.node, different(got[0], want), want.numel())
        assert different(got[0], want) == 0
