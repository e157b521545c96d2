"""Threads that do a compiled call together: PyTorch's own, or others where those are missing."""

import ctypes
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("numba", reason="numba is not installed")

from nemotron.ops.jit import native, openmp, team
from nemotron.ops.jit.team import Team

with_library = pytest.mark.skipif(
    openmp.parallel() is None, reason="this PyTorch has no OpenMP library of GNU's beside it"
)
CODE = ctypes.CFUNCTYPE(
    ctypes.c_int32, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p
)
Work = Callable[[int, int, int], int | None]
LIMITED = """
import torch
from ctypes import CFUNCTYPE, c_int32, c_int64, c_void_p, cast
from nemotron.ops.jit.team import Team
torch.set_num_threads(2)
kind = CFUNCTYPE(c_int32, *[c_void_p] * 2, *[c_int64] * 3, c_void_p)
code = kind(lambda *numbers: print(*numbers[3:5]) or 0)
Team().run(cast(code, c_void_p).value, 0)
"""


def address(code: object) -> int:
    return int(ctypes.cast(code, ctypes.c_void_p).value or 0)


@pytest.fixture
def kernel():
    """Makes code of functions of a record, a thread and how many there are, and their status."""
    kept = []

    def make(work: Work) -> int:
        kept.append(CODE(lambda result, error, *numbers: work(*numbers[:3]) or 0))
        return address(kept[-1])

    return make


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[pytest.param("PyTorch's", marks=with_library), "own"])
def threads_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "own":
        monkeypatch.setattr(team, "parallel", lambda: None)
    return str(request.param)


def test_every_thread_is_called_once_with_the_record(threads_of: str, kernel):
    calls: Counter[tuple[int, ...]] = Counter()
    together, count = Team(), kernel(lambda *numbers: calls.update([numbers]))
    for _ in range(50):
        together.run(count, 7)
        if threads_of == "own":  # a kernel waits for the others itself
            while sum(calls.values()) % 2:
                os.sched_yield()
    assert calls == {(7, 0, 2): 50, (7, 1, 2): 50}


@with_library
def test_calls_from_several_threads_take_turns(kernel):
    together, order = Team(), list[int]()
    append = kernel(lambda record, thread, threads: order.append(record))

    def ask(call: int) -> None:
        together.run(append, call)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(200)))
    assert order[::2] == order[1::2]
    assert sorted(order[::2]) == list(range(200))


@with_library
@pytest.mark.parametrize("failing", [0, 1])
def test_a_kernel_that_fails_in_a_thread_is_an_error(kernel, failing: int):
    fail = kernel(lambda record, thread, threads: int(thread == failing))
    with pytest.raises(RuntimeError, match="a compiled kernel failed"):
        Team().run(fail, 0)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_kernel_that_divides_by_zero_is_an_error(threads: int):
    from numba import njit

    from nemotron.ops.jit.scalars import items

    @njit(nogil=True)
    def divide(address, thread, threads, kind):
        items(address, 1, np.int64)[0] //= thread - threads + 1

    torch.set_num_threads(threads)
    number = np.ones(1, dtype=np.int64)
    with pytest.raises(RuntimeError, match="a compiled kernel failed"):
        Team().run(native.address_of(divide, torch.float32), number.ctypes.data)


@with_library
@pytest.mark.slow
def test_a_limit_on_threads_is_kept():
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    found = subprocess.run(
        [sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout == "0 1\n"


def test_a_forked_process_has_threads_of_its_own(kernel):
    together, done = Team(), list[int]()
    append = kernel(lambda record, thread, threads: done.append(thread))
    together.run(append, 0)
    child = os.fork()
    if child == 0:  # PyTorch's threads are missing here, and waiting for them would never end
        done.clear()
        together.run(append, 0)
        while len(done) < 2:
            os.sched_yield()
        os._exit(0 if sorted(done) == [0, 1] else 1)
    assert os.waitpid(child, 0)[1] == 0
