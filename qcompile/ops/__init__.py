"""The op table: one row per integer operator. See `qcompile.ops.row` for what a row holds."""

from qcompile.ops.convert import dequantize_call, quantize_call
from qcompile.ops.row import Act, Call, Example, Output, QValue, Row, Sample, Site, Weight
from qcompile.ops.table import ROWS, find, integer_rows, match, names, row, shape_rows
from qcompile.ops.unary import clamp_bounds

__all__ = [
    "ROWS",
    "Act",
    "Call",
    "Example",
    "Output",
    "QValue",
    "Row",
    "Sample",
    "Site",
    "Weight",
    "clamp_bounds",
    "dequantize_call",
    "find",
    "integer_rows",
    "match",
    "names",
    "quantize_call",
    "row",
    "shape_rows",
]
