"""Processes that stay: each test hands them a function, and gets what every rank returned."""

import gc
import itertools
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from tests.support import forked

TIMEOUT_S = 120


class Pool:
    """`world` processes, in a gloo group for each call; after a failure they are started anew."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call the function, which must stand in a module, on every rank; returns their results."""
        if not self._processes:
            self._start()
        task = pickle.dumps((function, arguments))
        for pipe in self._pipes:
            pipe.send_bytes(task)
        results, problems = self._collect()
        if problems:
            self.close()
            raise AssertionError("\n".join(problems))
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        folder = Path(tempfile.mkdtemp())
        for rank in range(self.world):
            ours, theirs = multiprocessing.Pipe()
            process = forked.start(_serve, rank, self.world, folder, theirs, daemon=True)
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self) -> tuple[list[Any], list[str]]:
        results: list[Any] = [None] * self.world
        missing, problems = set(range(self.world)), []
        deadline = time.monotonic() + TIMEOUT_S
        while missing and time.monotonic() < deadline:
            ready = multiprocessing.connection.wait([self._pipes[r] for r in missing], timeout=1)
            for pipe in ready:
                rank = self._pipes.index(pipe)
                missing.discard(rank)
                try:
                    fine, results[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    fine, results[rank] = False, "the process ended"
                if not fine:
                    problems.append(f"rank {rank}: {results[rank]}")
                    # the others may wait for this one for ever
                    deadline = min(deadline, time.monotonic() + 3)
        if missing and not problems:
            problems.append(f"ranks {sorted(missing)} did not answer in {TIMEOUT_S} s")
        return results, problems


def _serve(rank: int, world: int, folder: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for number in itertools.count():
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store-{number}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT_S),
        )
        try:
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
        # a group's threads ask for news a hundred times a second for as long as it exists, and what
        # DTensor remembers of its operations names meshes, which have groups
        dist.destroy_process_group()
        _clear_sharding_prop_cache()
        gc.collect()
