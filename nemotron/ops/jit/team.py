"""Threads that do one compiled call together."""

import os
import queue
import threading
import weakref
from typing import Any

import numpy as np
import torch

from nemotron.ops.jit import native
from nemotron.ops.jit.openmp import parallel

_PROCESS = os.getpid()
"""The process that imported this; a fork of it has none of PyTorch's threads."""


class Team:
    """As many threads as PyTorch uses: its own ones where they can be had.

    A call is of a kernel, by its address and that of its record, which waits for all threads before
    it returns. One call runs at a time, without the interpreter's lock. Elsewhere, and in a forked
    process, where PyTorch's threads are missing, threads of its own wait for work.
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

    def run(self, function: int, record: int) -> None:
        """Call a kernel in every thread.

        Raises:
            RuntimeError: when it fails in PyTorch's threads, or in the calling one.
        """
        with self._lock:
            threads, run = torch.get_num_threads(), parallel()
            if threads == 1:
                native.call(function, record, 0, 1)
            elif run is not None and os.getpid() == _PROCESS:
                self._counter[0] = 0
                run(function, record, threads)
            else:
                self._run_in_own(function, record, threads)

    def _run_in_own(self, function: int, record: int, threads: int) -> None:
        # only ever more: a thread may still have to see that the others came
        self._counter[0] += -self._counter[0] % threads
        self._hire(threads - 1)
        for thread, work in enumerate(self._queues[: threads - 1], 1):
            work.put((function, record, thread, threads))
        native.call(function, record, 0, threads)

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
        native.call(*task)


def _end(queues: list[queue.SimpleQueue[Any]]) -> None:
    for work in queues:
        work.put(None)
