"""Refine weights, biases and scales of each block together, so that it makes of quantized inputs what it did in float.

    minimize  E | block(x) - y |^2          x: what the quantized graph hands to the block; y: the float block's output

over the parameters of `qcompile.trainable`: what a layer's integers cannot make up for alone (a relu behind it, the
rounding of what the next layer reads, the other branch of a residual sum), the layers of a block make up for together.
Blocks come in graph order (see `qcompile.blocks`). First each layer of a block gets the weights of `round_weights`,
which must follow what the blocks before have become. Then come the steps of Adam, with rates that fall along a cosine.

A quarter of the samples is held back from these steps. A block keeps, of the parameters after each epoch, those with
the smallest error on the samples held back; and it keeps none, but stays as least squares made it, unless that error
has fallen by more than chance: on average by more than twice the standard error of the average. Least squares reads
all samples, as a few weigh little there; so the comparison is, if anything, unfair to the refinement.

Source: Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (2021), section 3.
There the error of each output is weighted by its part in the training loss, weights are rounded by AdaRound's
relaxation, and no sample is held back; here labels are not needed, and rounding passes gradients straight through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.blocks import Block, blocks
from qcompile.errors import CalibrationError
from qcompile.inputs import count_samples
from qcompile.ir import Program, Property
from qcompile.leastsquares import DECAY, solve
from qcompile.passes.base import Context, Pass, check_number
from qcompile.trainable import TrainableBlock
from qcompile.twins import Layer

_HELD_BACK = 4  # one sample of so many
_FEWEST = 8  # with one held back, nothing would tell a gain from chance
_BATCH = 2  # samples of one step of Adam
_WEIGHT_RATE, _BIAS_RATE, _SCALE_RATE = 0.02, 0.3, 3e-4
_STANDARD_ERRORS = 2


@dataclass(frozen=True)
class Reconstruct(Pass):
    """qdq -> qdq, with other weights, biases and scales.

    Attributes:
        epochs: how often each block sees the samples.
        seed: of the order of the samples, and of which are held back.
        decay: as of `RoundWeights`.

    Raises:
        ConfigError: an option is out of its range.
        CalibrationError: calibration kept fewer than 8 samples, or all of them in one batch of a static size.
    """

    name: ClassVar[str] = "reconstruct"
    requires: ClassVar[frozenset[Property]] = frozenset({Property.QDQ})
    epochs: int = 8
    seed: int = 0
    decay: float = DECAY

    def __post_init__(self) -> None:
        check_number("Reconstruct", "epochs", self.epochs, int, 1)
        check_number("Reconstruct", "seed", self.seed, int, 0, 2**63 - 1)
        check_number("Reconstruct", "decay", self.decay, float, 0)

    def run(self, program: Program, context: Context) -> bool:
        samples = _single(program, context.samples)
        count = sum(map(count_samples, samples))
        if count < _FEWEST or len(samples) < 2:
            batches = f" in {len(samples)} batch{'' if len(samples) == 1 else 'es'}"
            raise CalibrationError(
                f"calibration kept {count} samples{batches}; {_FEWEST} in two are needed to hold some back",
                where="pass 'reconstruct'",
                remedy="calibrate on more, with another preset than 'fast', which keeps none; "
                "or make the batch dynamic (dynamic_shapes), or smaller",
            )
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(samples), generator=generator)
        held_back, seen = order.tensor_split([max(1, len(order) // _HELD_BACK)])

        unseen = sum(count_samples(samples[i]) for i in held_back.tolist())

        def choose(layer: Layer) -> None:
            solve(layer, self.decay)

        def refine(block: Block) -> bool:
            if not (block.layers and block.outputs):
                return False
            trained = TrainableBlock(block)
            if not _fit(trained, seen, held_back.tolist(), self.epochs, generator):
                reason = f"the error of its block did not fall on the {unseen} samples that were held back"
                program.ledger.decline(self.name, block.layers[-1].node, reason)
                return False
            if not context.spend(self.name, block.layers[-1].node):
                return False
            trained.write()
            return True

        for done, total in blocks(program, samples, context.originals, choose, refine):
            context.report("reconstruct", done, total)
        return bool(context.originals)


def _single(program: Program, samples: list[list[Tensor]]) -> list[list[Tensor]]:
    """The samples one by one, where the batch of the model is dynamic; else in its static batches."""
    sizes = {spec.shape[0] if spec.shape else None for spec in program.inputs}
    size = sizes.pop()
    if sizes or not isinstance(size, tuple):
        return samples
    least = max(1, size[1])
    return [
        list(piece)
        for inputs in samples
        for piece in zip(*(x.split(least) for x in inputs), strict=True)
        if len(piece[0]) == least
    ]


def _fit(block: TrainableBlock, seen: Tensor, held_back: list[int], epochs: int, generator: torch.Generator) -> bool:
    """Train the parameters, and leave them at their best; whether the error has fallen on the samples held back."""
    before = lowest = _errors(block, held_back)
    best = [parameter.detach().clone() for parameter in block.parameters]
    rates = ((block.weights, _WEIGHT_RATE), (block.biases, _BIAS_RATE), (block.scales, _SCALE_RATE))
    optimizer = torch.optim.Adam([{"params": parameters, "lr": rate} for parameters, rate in rates])
    steps = epochs * -(-len(seen) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for batch in seen[torch.randperm(len(seen), generator=generator)].split(_BATCH):
            optimizer.zero_grad()
            with torch.enable_grad():
                for sample in batch.tolist():
                    (_error(block, sample).mean() / before.mean() / len(batch)).backward()
            optimizer.step()
            schedule.step()
        errors = _errors(block, held_back)
        if errors.mean() < lowest.mean():
            lowest, best = errors, [parameter.detach().clone() for parameter in block.parameters]
    for parameter, value in zip(block.parameters, best, strict=True):
        parameter.data.copy_(value)
    gain = before - lowest
    return bool(gain.mean() > _STANDARD_ERRORS * gain.std() / len(gain) ** 0.5)


def _errors(block: TrainableBlock, samples: list[int]) -> Tensor:
    """One for each row of the batches `samples`, float64."""
    with torch.no_grad():
        return torch.cat([_error(block, sample) for sample in samples]).double()


def _error(block: TrainableBlock, sample: int) -> Tensor:
    """The mean squared error of the outputs, summed: of each row, where all outputs have as many; else one."""
    made, wanted = block(sample), block.block.outputs
    squares = [(made[node] - wanted[node][sample]).square() for node in wanted]
    rows = {square.shape[0] if square.dim() > 1 else 1 for square in squares}
    count = rows.pop() if len(rows) == 1 else 1
    return torch.stack([square.reshape(count, -1).mean(1) for square in squares]).sum(0)
