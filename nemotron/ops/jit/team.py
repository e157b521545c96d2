"""Threads that do one compiled call together."""

import os
import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nemotron.ops.jit.openmp import parallel

_PROCESS = os.getpid()
"""The process that imported this; a fork of it has none of PyTorch's threads."""


class Team:
    """As many threads as PyTorch uses: its own ones where they can be had.

    A call takes a thread's number and how many there are as its last arguments, waits for all of
    them before it returns, and releases the interpreter's lock. One call runs at a time. Elsewhere,
    and in a forked process, where PyTorch's threads are missing, threads of its own wait for work.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counter = np.zeros(8, dtype=np.int64)
        self.counter = int(self._counter.ctypes.data)
        """Address of the number with which the threads wait for each other."""
        self._queues: list[queue.SimpleQueue[Any]] = []
        self._process = os.getpid()
        self._finalizer = weakref.finalize(self, _end, self._queues)

    def __deepcopy__(self, memo: object) -> "Team":
        return Team()

    def run(self, function: Callable[..., None], *arguments: int) -> None:
        """Call function(*arguments, thread, threads) in every thread."""
        with self._lock:
            threads, run = torch.get_num_threads(), parallel()
            if threads == 1:
                function(*arguments, 0, 1)
            elif run is not None and os.getpid() == _PROCESS:
                self._counter[0] = 0
                run(lambda thread, threads: function(*arguments, thread, threads), threads)
            else:
                self._run_in_own(function, arguments, threads)

    def _run_in_own(
        self, function: Callable[..., None], arguments: tuple[int, ...], threads: int
    ) -> None:
        # only ever more: a thread may still have to see that the others came
        self._counter[0] += -self._counter[0] % threads
        self._hire(threads - 1)
        for thread, work in enumerate(self._queues[: threads - 1], 1):
            work.put((function, (*arguments, thread, threads)))
        function(*arguments, 0, threads)

    def _hire(self, count: int) -> None:
        if self._process != os.getpid():  # threads stay behind in a fork
            self._queues.clear()
            self._process = os.getpid()
        while len(self._queues) < count:
            work: queue.SimpleQueue[Any] = queue.SimpleQueue()
            self._queues.append(work)
            name = f"token-step-{len(self._queues)}"
            threading.Thread(target=_work, args=(work,), name=name, daemon=True).start()


def _work(work: queue.SimpleQueue[Any]) -> None:
    while (task := work.get()) is not None:
        function, arguments = task
        function(*arguments)
        del task, function, arguments


def _end(queues: list[queue.SimpleQueue[Any]]) -> None:
    for work in queues:
        work.put(None)
