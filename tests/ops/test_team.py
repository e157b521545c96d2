"""Threads that do a compiled call together: PyTorch's own, or others where those are missing."""

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nemotron.ops.jit import openmp, team
from nemotron.ops.jit.team import Team

with_library = pytest.mark.skipif(
    openmp.parallel() is None, reason="this PyTorch has no OpenMP library of GNU's beside it"
)
LIMITED = """
import torch
from nemotron.ops.jit.team import Team
torch.set_num_threads(2)
Team().run(lambda thread, threads: print(thread, threads))
"""


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


def test_every_thread_is_called_once_with_the_arguments(threads_of: str):
    calls: Counter[tuple[int, ...]] = Counter()
    together = Team()
    for _ in range(50):
        together.run(lambda *numbers: calls.update([numbers]), 7)
        if threads_of == "own":  # a kernel waits for the others itself
            while sum(calls.values()) % 2:
                os.sched_yield()
    assert calls == {(7, 0, 2): 50, (7, 1, 2): 50}


@with_library
def test_calls_from_several_threads_take_turns():
    together, order = Team(), list[int]()

    def ask(call: int) -> None:
        together.run(lambda thread, threads: order.append(call))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(200)))
    assert order[::2] == order[1::2]
    assert sorted(order[::2]) == list(range(200))


@with_library
def test_an_error_in_a_thread_reaches_the_caller():

    def fail(thread: int, threads: int) -> None:
        if thread == 1:
            raise ValueError("in the second thread")

    with pytest.raises(ValueError, match="in the second thread"):
        Team().run(fail)


@with_library
def test_a_limit_on_threads_is_kept():
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    found = subprocess.run(
        [sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout == "0 1\n"


def test_a_forked_process_has_threads_of_its_own():
    together = Team()
    together.run(lambda thread, threads: None)
    child = os.fork()
    if child == 0:  # PyTorch's threads are missing here, and waiting for them would never end
        done: list[int] = []
        together.run(lambda thread, threads: done.append(thread))
        while len(done) < 2:
            os.sched_yield()
        os._exit(0 if sorted(done) == [0, 1] else 1)
    assert os.waitpid(child, 0)[1] == 0
