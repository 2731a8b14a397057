"""What torch.export says when it refuses a model, turned into a CaptureError with the user's own line."""

from __future__ import annotations

import linecache
import sysconfig
from pathlib import Path

import torch

from qcompile.errors import CaptureError

_TORCH = str(Path(torch.__file__).parent)
_OURS = str(Path(__file__).parent)
_STANDARD = sysconfig.get_path("stdlib")
_DATA_DEPENDENT = ("data-dependent", "GuardOnDataDependent", "Could not guard on", "Could not extract specialized")
_CONSTRAINT = ("Constraints violated", "ConstraintViolation", "dynamic_shapes", "ValueRangeError")


def user_line(error: BaseException) -> str | None:
    """The innermost line of the user's that `error` passed through: "file:12, in forward: code". Torch, qcompile
    and Python's own library are not the user's."""
    found, trace = None, error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        name = code.co_filename
        standard = name.startswith(_STANDARD) and "-packages" not in name  # which may lie inside
        if not standard and not name.startswith((_TORCH, _OURS, "<")):
            text = linecache.getline(name, trace.tb_lineno).strip()
            found = f"{name}:{trace.tb_lineno}, in {code.co_name}: {text}"
        trace = trace.tb_next
    return (
        found
        if (found is not None and "in forward" in found) or error.__cause__ is None
        else user_line(error.__cause__)
    )


def export_refused(error: Exception) -> CaptureError:
    """Wrap what torch.export raised: its own reason, the user's line, and what to do."""
    reason = str(error).strip() or type(error).__name__
    text = f"{type(error).__name__}: {reason}"
    if any(mark in text for mark in _DATA_DEPENDENT):
        what = "control flow on data: the model branches on the values of a tensor"
        remedy = "compute both branches and choose with torch.where, or make the condition a constant of the model"
    elif any(mark in text for mark in _CONSTRAINT):
        what = "the dynamic shapes do not fit the model"
        remedy = "follow torch's suggestion above, or leave that dimension static"
    else:
        what = "torch.export refuses the model"
        remedy = "check that model(*example_inputs) runs; then see torch's reason above"
    return CaptureError(f"{what}\n  torch:  {text}", source=user_line(error), remedy=remedy)
