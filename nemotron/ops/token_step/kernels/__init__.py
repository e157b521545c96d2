"""Compiled kernels of steps over a few tokens; but for `records` they import numba, optional."""
