"""PyTorch's own threads, called through the OpenMP library that it has loaded.

After a matrix product PyTorch's threads look for work for some milliseconds before they sleep.
Threads of our own would share their cores meanwhile: they made the scan's gradient take 1.4 times
as long.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch

_Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _library() -> Path | None:
    """Return GNU's OpenMP library beside PyTorch's own, which Linux wheels have."""
    path = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    return path if path.is_file() and torch.backends.openmp.is_available() else None


@functools.cache
def parallel() -> Callable[[Callable[[int, int], None], int], None] | None:
    """Return what calls work(thread, threads) in that many threads, or None where it is missing.

    There may be fewer threads than asked for, as where OMP_THREAD_LIMIT says so. The first error
    in a thread is raised after all of them have ended.
    """
    path = _library()
    if path is None:
        return None
    start = ctypes.CDLL(str(path)).GOMP_parallel  # without the interpreter's lock
    start.argtypes, start.restype = [_Work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    locked = ctypes.PyDLL(str(path))
    number, count = locked.omp_get_thread_num, locked.omp_get_num_threads

    def run(work: Callable[[int, int], None], threads: int) -> None:
        errors: list[BaseException] = []

        def call(_: int | None) -> None:
            try:
                work(number(), count())
            except BaseException as error:
                errors.append(error)

        start(_Work(call), None, threads, 0)
        if errors:
            raise errors[0]

    return run
