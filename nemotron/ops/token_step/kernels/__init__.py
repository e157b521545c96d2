"""Compiled kernels of steps over a few tokens; all but `records` import numba, which is optional."""
