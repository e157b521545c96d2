"""PyTorch's own threads, called through the OpenMP library that it has loaded.

After a matrix product PyTorch's threads look for work for some milliseconds before they sleep.
Threads of our own would share their cores meanwhile: they made the scan's gradient take 1.4 times
as long.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nemotron.ops.jit import native, storage


@functools.cache
def _library() -> Path | None:
    """Return GNU's OpenMP library beside PyTorch's own, which Linux wheels have."""
    path = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    return path if path.is_file() and torch.backends.openmp.is_available() else None


@functools.cache
def parallel() -> Callable[[int, int, int], None] | None:
    """Return what calls a kernel at an address, with a record, in that many threads, or None where
    the library is missing.

    There may be fewer threads than asked for, as where OMP_THREAD_LIMIT says so. A kernel that
    fails in any thread is an error after all of them have ended. No thread waits for the
    interpreter's lock, which would take longer than a small kernel.
    """
    path = _library()
    if path is None:
        return None
    library = ctypes.CDLL(str(path))
    start = library.GOMP_parallel
    start.argtypes, start.restype = [ctypes.c_void_p] * 2 + [ctypes.c_uint] * 2, None
    named = (library.omp_get_thread_num, library.omp_get_num_threads)
    number, count = (ctypes.cast(function, ctypes.c_void_p).value for function in named)
    enter = storage.load("nemotron.ops.jit.enter").enter.address

    def run(function: int, record: int, threads: int) -> None:
        work = np.array([function, record, number, count, 0])
        start(enter, work.ctypes.data, threads, 0)
        native.check(work[4] == 0)

    return run
