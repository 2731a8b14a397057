"""The op table: one row per integer operator. See `qcompile.ops.row` for what a row holds."""

from qcompile.ops.row import Output, QValue, Row, Sample, Site, Weight
from qcompile.ops.table import ROWS, find, match

__all__ = ["ROWS", "Output", "QValue", "Row", "Sample", "Site", "Weight", "find", "match"]
