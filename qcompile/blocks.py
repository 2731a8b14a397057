"""A qdq graph cut into blocks, each with what the quantized graph hands to it and what it makes in the float graph.

A block ends where a single quantized tensor is all that the rest of the graph reads of what came before: behind a
residual sum, or behind a layer that nothing bypasses. What comes without a layer of its own belongs to the next block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qcompile.ir import Program, is_tensor
from qcompile.qdq import is_dequantize
from qcompile.twins import Layer, Run, is_layer


@dataclass
class Block:
    """Consecutive nodes of a qdq graph.

    Attributes:
        program: whose block it is.
        nodes: in order, constants among them.
        inputs: what it reads of earlier blocks, and inputs of the model -> values in the quantized graph, one per
            sample.
        outputs: the real tensors that later blocks read of it -> values in the float graph, one per sample.
        originals: name of a node of the qdq graph -> what it was in float.
    """

    program: Program
    nodes: list[fx.Node]
    inputs: dict[fx.Node, list[Any]]
    outputs: dict[fx.Node, list[Tensor]]
    originals: dict[str, Tensor]

    @property
    def layers(self) -> list[Layer]:
        """Those with a known float weight; without their inputs and outputs."""
        return [
            Layer(self.program, node, [], [], self.originals) for node in self.nodes if is_layer(node, self.originals)
        ]


def blocks(
    program: Program,
    samples: list[list[Tensor]],
    originals: dict[str, Tensor],
    visit_layer: Callable[[Layer], None],
    visit: Callable[[Block], bool],
) -> Iterator[tuple[int, int]]:
    """Call `visit_layer(layer)` for each layer of a block, then `visit(block)`, which says whether it has changed the
    block; then the next block. Yields (blocks done, blocks in all).

    What is held at one time is what one block reads and makes.

    Args:
        samples: inputs of the model.
        originals: name of a node of the qdq graph -> what it was in float.
    """
    pieces, real = cut(program, originals), _real(program)
    run = Run(program, samples, originals)
    for done, nodes in enumerate(pieces, 1):
        inside = set(nodes)
        inputs = {used: run.quantized[used] for node in nodes for used in node.all_input_nodes if used not in inside}
        inputs |= {node: run.step(node, False) for node in nodes if node.op == "placeholder"}
        for _ in run.layers(nodes, visit_layer):
            pass
        outputs = {node: run.float[node] for node in nodes if node in real and not inside.issuperset(node.users)}
        if visit(Block(program, nodes, inputs, outputs, originals)):
            run.again(nodes, inputs)
        yield done, len(pieces)


def cut(program: Program, originals: dict[str, Tensor]) -> list[list[fx.Node]]:
    """The nodes of each block, in graph order, the output node left out."""
    real = _real(program)
    last = {used: user for user in program.graph.nodes for used in user.all_input_nodes}
    found: list[list[fx.Node]] = [[]]
    alive: set[fx.Node] = set()  # real tensors that are read further on
    for node in program.graph.nodes:
        if node.op == "output":
            break
        found[-1].append(node)
        alive = {each for each in (*alive, node) if each in real and last.get(each, node) is not node}
        if is_dequantize(node) and alive == {node} and any(is_layer(each, originals) for each in found[-1]):
            found.append([])
    *whole, rest = found
    if whole and not any(is_layer(node, originals) for node in rest):
        whole[-1] += rest
        return whole
    return found


def _real(program: Program) -> set[fx.Node]:
    """The tensors of real values that depend on an input of the model."""
    computed: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder" or not computed.isdisjoint(node.all_input_nodes):
            computed.add(node)
    return {node for node in computed if is_tensor(node) and node.meta["val"].is_floating_point()}
