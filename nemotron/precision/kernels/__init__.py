"""Triton kernels of the number formats; only imported where Triton is installed."""
