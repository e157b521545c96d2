"""Search for the launch parameters of kernels: `python -m nemotron.tune`.

A kernel's module declares what may be tried (`Tunable`). A search compiles candidates in processes
without a device, drops those that spill registers or do not fit, checks the results of the others
against the default's, times them, and keeps what it learned in the tuning base.
"""
