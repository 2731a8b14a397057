"""Targets: what can be compiled for, and the way from an integer graph to machine code."""

from __future__ import annotations

from qcompile.targets.base import InstructionSet, Target
from qcompile.targets.registry import get, names

__all__ = ["InstructionSet", "Target", "get", "names"]
