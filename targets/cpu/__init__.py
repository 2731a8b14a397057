"""Kernel generators that x86 and ARM share, driven by instruction-set rows."""
