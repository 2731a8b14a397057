"""Random networks, compiled as a user compiles them: the machine code gives the bits of the reference."""

from __future__ import annotations

import pytest
import torch
from execution import ARM, CUDA, X86, different, quick, run_on, skip_unless_runnable
from gpu_machine import REAL, compiling
from gpu_table import record
from graphs import Apply, Graph, graphs
from hypothesis import HealthCheck, assume, given, settings
from passing import randomize
from torch import nn

import qcompile
from qcompile.errors import BuildError
from qcompile.targets.requests import ONLY_MOVES


def bounded(examples: int) -> settings:
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def mismatching(graph: Graph, target: str, request: pytest.FixtureRequest) -> list[int]:
    """How many elements of each output, over several inputs, are not the reference's."""
    skip_unless_runnable(target)
    batch = torch.export.Dim("batch", min=1, max=8)
    try:
        with compiling():
            compiled = qcompile.compile(
                graph,
                target,
                calibration=[graph.sample(seed) for seed in (1, 2)],
                dynamic_shapes=(tuple({0: batch} for _ in graph.inputs),) if graph.dynamic else None,
                strict=True,
            )
    except BuildError as error:
        assume(target not in CUDA or ONLY_MOVES not in str(error))
        raise
    # The second is far out of the calibrated range: it saturates.
    cases = [graph.sample(3), graph.sample(4, spread=3.0)]
    if graph.dynamic:
        cases += [graph.sample(5, batch=size) for size in (1, 7)]
    runs = run_on(compiled.artifact, cases, request)
    wanted = [compiled.program(*inputs) for inputs in cases]
    found = []
    for outputs, wants in zip(runs, wanted, strict=True):
        for got, want in zip(outputs, wants, strict=True):
            found.append(different(got, want))
            record(request.node, found[-1], want.numel())
    return found


@pytest.mark.parametrize("target", quick(X86))
@bounded(14)
@given(graph=graphs())
def test_a_random_network_gives_the_bits_of_its_reference(
    target: str, graph: Graph, request: pytest.FixtureRequest
) -> None:
    assert not any(mismatching(graph, target, request))


@pytest.mark.parametrize("target", quick(X86))
@bounded(6)
@given(graph=graphs(dynamic=True))
def test_a_random_network_gives_the_same_bits_for_every_batch_size(
    target: str, graph: Graph, request: pytest.FixtureRequest
) -> None:
    assert not any(mismatching(graph, target, request))


@pytest.mark.parametrize("target", ARM)
@bounded(4)
@given(graph=graphs())
def test_a_random_network_gives_the_bits_of_its_reference_on_arm(
    target: str, graph: Graph, request: pytest.FixtureRequest
) -> None:
    assert not any(mismatching(graph, target, request))


@pytest.mark.parametrize("target", quick([*X86, *ARM]))
def test_any_number_of_rows_may_be_multiplied_for_each_image(target: str, request: pytest.FixtureRequest) -> None:
    """A tile of rows may or may not divide the rows of a batch whose size is not known."""
    graph = Graph([(2, 9, 16)], dynamic=True)
    rows = [graph.add(Apply(torch.narrow, 1, 0, count), 0) for count in range(1, 10)]
    graph.outputs = tuple(graph.add(nn.Linear(16, 24), value) for value in rows)
    randomize(graph)
    assert not any(mismatching(graph, target, request))


@pytest.mark.slow
@pytest.mark.parametrize("target", quick([*X86, *ARM]))
@bounded(100)
@given(graph=graphs())
def test_many_random_networks_give_the_bits_of_their_references(
    target: str, graph: Graph, request: pytest.FixtureRequest
) -> None:
    assert not any(mismatching(graph, target, request))


@pytest.mark.slow
@pytest.mark.parametrize("target", quick([*X86, *ARM]))
@bounded(50)
@given(graph=graphs(dynamic=True))
def test_many_random_networks_give_the_same_bits_for_every_batch_size(
    target: str, graph: Graph, request: pytest.FixtureRequest
) -> None:
    assert not any(mismatching(graph, target, request))


@pytest.mark.parametrize("target", quick(CUDA, gpus=["cuda-sm_80"]))
@bounded(4)
@given(graph=graphs())
def test_a_random_network_gives_the_bits_of_its_reference_on_a_gpu(
    target: str, graph: Graph, request: pytest.FixtureRequest
) -> None:
    assert not any(mismatching(graph, target, request))


@pytest.mark.parametrize("target", quick(CUDA, gpus=["cuda-sm_80"]))
@bounded(3)
@given(graph=graphs(dynamic=True))
def test_a_random_network_gives_the_same_bits_for_every_batch_size_on_a_gpu(
    target: str, graph: Graph, request: pytest.FixtureRequest
) -> None:
    assert not any(mismatching(graph, target, request))


@pytest.mark.slow
@pytest.mark.parametrize("target", quick(CUDA))
@bounded(10 if REAL else 50)  # NVIDIA's compiler takes its time
@given(graph=graphs(dynamic=True))
def test_many_random_networks_give_the_bits_of_their_references_on_a_gpu(
    target: str, graph: Graph, request: pytest.FixtureRequest
) -> None:
    assert not any(mismatching(graph, target, request))
