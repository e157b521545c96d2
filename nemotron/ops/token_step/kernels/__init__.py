"""Compiled kernels of steps over a few tokens; imports numba, which is an optional package."""
