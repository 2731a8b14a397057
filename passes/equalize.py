"""Give the channels between two layers like strengths, so that one scale per tensor suits them all.

    w2 f(w1 x + b1)  =  (w2 / s) f((s w1) x + s b1)        s_i = sqrt(r2_i / r1_i)
    r1_i = max |w1[i, :]|, or if that is more, |b1_i| max |w1| / max |b1|
    r2_i = max |w2[:, i]|, over all layers that read the channel

leaves max |row| = max |column| = sqrt(r1_i r2_i), with which the sum over the channels of r1_i / max r1 * r2_i / max r2
is largest. A weight has a scale per row already; what this is for is the activation between, whose channels share one
scale and are as uneven as the rows, and the columns of w2, of which each row holds all. A layer reads one link and
makes the next, so all links are gone through again until no factor changes. What f may be, see `qcompile.channels`;
relu6 is none, as its 6 is the same for every channel.

The bias counts because a batch norm may have left a channel next to nothing but a bias: by its weights alone it would
be made stronger than all others. A channel with nothing on one side (r = 0) keeps its strength. Large biases are not
absorbed into the next layer: relu(v + c) = relu(v) + c holds for v >= -c only, so it would change the float network.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), sections 4.1.1
and 4.1.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.channels import LAYERS, Link, bias_of, columns, links_behind, move, per_column, rows, weight_of
from qcompile.ir import Program, Property
from qcompile.passes.base import Context, Pass

_SETTLED = 1e-3  # of the logarithm of a factor
_SWEEPS = 100  # more than any network needed


@dataclass(frozen=True)
class Equalize(Pass):
    """Float -> float, with the same values."""

    name: ClassVar[str] = "equalize"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.FLOAT, Property.CANONICAL, Property.BATCHNORM_FOLDED})

    def run(self, program: Program, context: Context) -> bool:
        links = links_behind(program, LAYERS, self.name)
        changed = False
        for each, factors in zip(links, _factors(program, links), strict=True):
            if float(factors.log().abs().max()) > _SETTLED and context.spend(self.name, each.maker):
                move(program, each, factors)
                changed = True
        return changed


def _factors(program: Program, links: list[Link]) -> list[Tensor]:
    """The factor of each channel of each link with which nothing is left to equalize."""
    weights: dict[fx.Node, Tensor] = {}
    for each in links:
        for node in (each.maker, *each.readers):
            weights.setdefault(node, weight_of(program, node))
    biases = {each.maker: bias_of(program, each.maker) for each in links}
    found = [torch.ones(len(weights[each.maker]), dtype=torch.float64) for each in links]
    for _ in range(_SWEEPS):
        moved = 0.0
        for each, factors in zip(links, found, strict=True):
            change = _step(each, weights, biases[each.maker])
            factors *= change
            moved = max(moved, float(change.log().abs().max()))
        if moved < _SETTLED / 10:
            break
    return found


def _step(each: Link, weights: dict[fx.Node, Tensor], bias: Tensor) -> Tensor:
    """Equalize one link as the weights are now, in place; returns the factors."""
    made = strength(weights[each.maker], bias)
    read = torch.stack([columns(r, weights[r]).abs().amax(1) for r in each.readers]).amax(0)
    alive = (made > 0) & (read > 0)
    factors = torch.where(alive, (read / made).sqrt(), 1.0)
    rows(weights[each.maker]).mul_(factors[:, None])
    bias.mul_(factors)
    for reader in each.readers:
        weights[reader].div_(per_column(reader, weights[reader], factors))
    return factors


def strength(weight: Tensor, bias: Tensor) -> Tensor:
    """r1 (channels,) of what a layer makes."""
    of_weight, of_bias = rows(weight).abs().amax(1), bias.abs()
    largest = of_bias.max()
    return torch.maximum(of_weight, of_bias * (of_weight.max() / largest)) if largest > 0 else of_weight
