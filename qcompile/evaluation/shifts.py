"""Shifts of the inputs, to see whether int8 is as robust as float: each keeps shape and type.

Sizes are relative to each sample's own mean and standard deviation s, since inputs come in any normalization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from qcompile.errors import ConfigError, InputError
from qcompile.evaluation.feed import Piece

Shift = Callable[[Tensor], Tensor]
SMALLEST_IMAGE = 8  # height and width


def noise(x: Tensor) -> Tensor:
    """Gaussian, of 0.1 s; the same for equal shapes."""
    generator = torch.Generator().manual_seed(0)
    return x + 0.1 * _spread(x) * torch.randn(x.shape, generator=generator)


def blur(x: Tensor) -> Tensor:
    """With the binomial 5 x 5 kernel, which is nearly a Gaussian of 1 pixel; edges are repeated."""
    line = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    kernel = (line[:, None] * line).expand(x.shape[1], 1, 5, 5)
    return conv2d(pad(x, (2, 2, 2, 2), mode="replicate"), kernel, groups=x.shape[1])


def _brighter(amount: float) -> Shift:
    return lambda x: x + amount * _spread(x)


def _contrast(factor: float) -> Shift:
    def change(x: Tensor) -> Tensor:
        mean = _over_sample(x, torch.mean)
        return mean + factor * (x - mean)

    return change


def _over_sample(x: Tensor, measure: Any) -> Tensor:
    if x.dim() < 2:
        return measure(x)
    return measure(x, dim=tuple(range(1, x.dim())), keepdim=True)


def _spread(x: Tensor) -> Tensor:
    return _over_sample(x, torch.std) if x.numel() > len(x) else x.abs()


_ANY: dict[str, Shift] = {"noise": noise}
_IMAGES: dict[str, Shift] = {
    "blur": blur,
    "brighter": _brighter(0.5),
    "darker": _brighter(-0.5),
    "more contrast": _contrast(1.5),
    "less contrast": _contrast(0.6),
}


def is_image(x: Tensor) -> bool:
    """Whether `x` looks like images: float, (N, 1 or 3 channels, height, width), large enough to blur."""
    return x.is_floating_point() and x.dim() == 4 and x.shape[1] in (1, 3) and min(x.shape[2:]) >= SMALLEST_IMAGE


def resolve(robustness: bool | Mapping[str, Shift]) -> dict[str, Shift] | None:
    """The shifts that a user asks for; None stands for the usual ones, which depend on the inputs.

    Raises:
        ConfigError: it is neither a bool nor a mapping of names to callables.
    """
    if isinstance(robustness, bool):
        return None if robustness else {}
    if not isinstance(robustness, Mapping) or not all(map(callable, robustness.values())):
        raise ConfigError(
            f"robustness is {robustness!r}",
            where="robustness",
            remedy="give True, or a dict such as {'noise': lambda x: x + 0.1 * torch.randn_like(x)}",
        )
    return {str(name): shift for name, shift in robustness.items()}


def usual(inputs: tuple[Tensor, ...]) -> tuple[dict[str, Shift], str | None]:
    """The shifts that make sense for these inputs, and why there are no more."""
    floats = [x for x in inputs if x.is_floating_point()]
    shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
    if not floats:
        return {}, "no robustness: no input holds real numbers, which noise could be added to"
    if all(map(is_image, floats)):
        return _ANY | _IMAGES, None
    return dict(_ANY), (
        f"robustness against noise only: inputs of shape {shapes} do not look like images "
        f"(N, 1 or 3 channels, height and width from {SMALLEST_IMAGE}), so blur, brightness and contrast mean nothing"
    )


def shifted(piece: Piece, name: str, shift: Shift) -> Piece:
    """`piece` with its real inputs shifted.

    Raises:
        InputError: the shift raises, or changes shape or type, or gives something that is no tensor.
    """

    def change(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        try:
            y = shift(x.clone())  # a shift may work in place
        except Exception as error:
            raise InputError(
                f"the shift {name!r} raised {type(error).__name__}: {error}",
                where=piece.place,
                remedy="a shift takes a batch of one input, and returns one of the same shape",
            ) from error
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            got = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
            raise InputError(
                f"the shift {name!r} made {got} of {x.dtype} {tuple(x.shape)}",
                where=piece.place,
                remedy="a shift keeps shape and type",
            )
        return y

    return piece.mapped(change)
