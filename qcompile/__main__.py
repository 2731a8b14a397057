"""`python -m qcompile` is the command `qcompile`."""

from qcompile.cli import app

app(prog_name="qcompile")
