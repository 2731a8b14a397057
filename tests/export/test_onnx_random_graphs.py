"""Random networks as ONNX: ONNX Runtime, node by node, stays near the reference, whatever the batch."""

from __future__ import annotations

import pytest
import torch
from graphs import Graph, graphs
from hypothesis import HealthCheck, given, settings
from onnx_session import Session

import qcompile


def bounded(examples: int) -> settings:
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def farthest(graph: Graph) -> float:
    """The largest difference, as a part of the range of its output."""
    batch = torch.export.Dim("batch", min=1, max=8)
    quantized = qcompile.quantize(
        graph,
        calibration=[graph.sample(seed) for seed in (1, 2)],
        dynamic_shapes=(tuple({0: batch} for _ in graph.inputs),) if graph.dynamic else None,
    )
    session = Session(quantized, fused=False)
    cases = [graph.sample(3), graph.sample(4, spread=3.0)]
    if graph.dynamic:
        cases += [graph.sample(5, batch=size) for size in (1, 7)]
    most = 0.0
    for inputs in cases:
        for expected, actual in zip(quantized(*inputs), session(*inputs), strict=True):
            assert expected.shape == actual.shape
            spread = float(expected.max() - expected.min()) or 1.0
            most = max(most, float((expected - actual).abs().max()) / spread)
    return most


@bounded(6)
@given(graph=graphs())
def test_a_random_network(graph: Graph) -> None:
    assert farthest(graph) < 0.1


@bounded(4)
@given(graph=graphs(dynamic=True))
def test_a_random_network_of_every_batch_size(graph: Graph) -> None:
    assert farthest(graph) < 0.1


@pytest.mark.slow
@bounded(60)
@given(graph=graphs())
def test_many_random_networks(graph: Graph) -> None:
    assert farthest(graph) < 0.1
