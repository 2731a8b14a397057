"""Kernels for NVIDIA GPUs. Their code is CUDA C++ in `device/`; the modules here choose which of it a network needs,
and make the functions that launch it."""
