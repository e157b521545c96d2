"""Compiled kernels by their addresses, called without the interpreter.

A kernel takes the address of a record of what it is to do, a thread's number and how many threads
there are, and a number format, for which it is compiled. Its machine code is called as numba's own
functions call each other: a status is returned, and two places are given before the arguments, for
the result and for an error.
"""

import ctypes
import functools
from typing import Any

import torch

_Kernel = ctypes.CFUNCTYPE(
    ctypes.c_int32, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p
)


@functools.cache
def kind_of(dtype: torch.dtype) -> Any:  # Any: a type of numpy, which numba understands
    """Return what names a number format for a kernel."""
    from nemotron.ops.jit.scalars import KINDS

    return KINDS[str(dtype).removeprefix("torch.")]


@functools.cache
def address_of(kernel: Any, dtype: torch.dtype) -> int:  # Any: a function of numba's
    """Return where a kernel's machine code for a number format is; compile it or load it."""
    from numba import typeof, types

    signature = types.void(*[types.int64] * 3, typeof(kind_of(dtype)))
    kernel.compile(signature.args)
    found = kernel.get_compile_result(signature)
    return int(found.library.get_pointer_to_function(found.fndesc.llvm_func_name))


def call(function: int, record: int, thread: int, threads: int) -> None:
    """Call a kernel at an address in this thread, without the interpreter's lock.

    Raises:
        RuntimeError: when the kernel fails, as it does when it divides by an integer 0.
    """
    places = (ctypes.c_void_p * 2)()
    result, error = ctypes.addressof(places), ctypes.addressof(places) + 8
    check(_Kernel(function)(result, error, record, thread, threads, None) == 0)


def check(is_done: bool) -> None:
    """Raise the error of a kernel that failed."""
    if not is_done:
        raise RuntimeError("a compiled kernel failed; ops.<operation>: reference does without it.")
