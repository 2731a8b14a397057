"""Every error a user can meet.

One base class, `QcompileError`, so that ``except QcompileError`` catches them all. Each error says
what was wrong, where (the module path in the user's model and the source line, where known) and
what to do about it. This module imports nothing, so that the runtime can use it on a bare device.
"""

from __future__ import annotations


class QcompileError(Exception):
    """Base of every error raised for a user's mistake or an unsupported request.

    Args:
        what: what was wrong, one sentence.
        where: the place in the user's terms: a module path ("layers.0.conv"), a file, an argument.
        source: the user's source line ("model.py:12, in forward: y = x + 1"), where known.
        remedy: what the user can do.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        source: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.where, self.source, self.remedy = what, where, source, remedy
        lines = [what]
        lines += [f"  where:  {where}"] if where else []
        lines += [f"  source: {source}"] if source else []
        lines += [f"  remedy: {remedy}"] if remedy else []
        super().__init__("\n".join(lines))


class CaptureError(QcompileError):
    """The model cannot be captured as a graph (torch.export refuses it, training mode, NaN weights)."""


class CalibrationError(QcompileError):
    """The calibration data or the example inputs are missing, malformed or not finite."""


class CalibrationWarning(UserWarning):
    """There is so little calibration data that the quantization depends on its chance."""


class AccuracyWarning(UserWarning):
    """A search for accuracy did not reach what it was asked for; its result is the best that was found."""


class ConfigError(QcompileError):
    """A configuration contradicts itself or names something that does not exist."""


class TargetError(QcompileError):
    """The target is unknown, or cannot do what was asked of it."""


class PipelineError(QcompileError):
    """A pipeline is ill-formed: an unmet requirement, a duplicate or unknown pass name."""


class PassError(QcompileError):
    """A pass failed, or left a graph that is not legal at its stage. Names the pass."""


class QuantizationError(QcompileError):
    """A tensor cannot be quantized exactly (for example: an int32 accumulator could overflow)."""


class StrictError(QcompileError):
    """`strict=True` and some operator would have stayed float."""


class BuildError(QcompileError):
    """Lowering or building machine code failed (for example: no linker for the target)."""


class ArtifactError(QcompileError):
    """An artifact is truncated, tampered with, from a newer format, or not an artifact at all."""


class DeviceError(QcompileError):
    """The artifact needs a processor feature or architecture that this machine lacks."""


class InputError(QcompileError):
    """The inputs of a call do not fit the compiled model: count, shape or dtype."""


class ExportError(QcompileError):
    """The model cannot be written in another format: an operator without a counterpart, a missing package, a path."""
