"""The process group of a run: how this process was started, its beginning and its end."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nemotron.errors import UserError
from nemotron.exit_codes import FAILED
from nemotron.parallel.config import ParallelConfig
from nemotron.terminal import say

T = TypeVar("T")

MOST_RANKS = 1 << 20
ECHO_S = 10.0
"""Seconds in which torchrun or srun ends the other ranks when one has ended."""


@dataclass(frozen=True)
class Launch:
    """The place of this process, from the variables that torchrun or another launcher sets."""

    rank: int
    world: int
    local_rank: int
    host: str
    """Where the first rank can be reached; empty for a process that does not meet it."""
    port: int

    @classmethod
    def of_this_process(cls, *, meets: bool = True) -> "Launch | None":
        """Read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

        None for a process that was started alone. One that never `meets` the others, as in a dry
        run, needs no address of theirs.

        Raises:
            UserError: when they are there in part, or out of range.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        values = [os.environ.get(name) for name in names]
        if values[:2] == [None, None]:
            return None
        try:
            rank, world, local = (int(value or "") for value in values)
        except ValueError:
            given = ", ".join(f"{n}={v}" for n, v in zip(names, values, strict=True))
            rule = f"{given} must be three numbers; start the ranks with torchrun, which sets them."
            raise UserError(rule, where="environment") from None
        if not 1 <= world <= MOST_RANKS:
            raise UserError(
                f"must lie in 1 … {MOST_RANKS}.", key=names[1], value=world, where="environment"
            )
        for name, number in zip(names[::2], (rank, local), strict=True):
            if not 0 <= number < world:
                rule = f"must lie in 0 … {world - 1}, below WORLD_SIZE."
                raise UserError(rule, key=name, value=number, where="environment")
        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
        if not meets and host is None and not port:
            return cls(rank, world, local, "", 0)
        if not host or not (port.isdecimal() and len(port) < 9 and 0 < int(port) < 1 << 16):
            raise UserError(
                f"MASTER_ADDR={host}, MASTER_PORT={port or None} must say where rank 0 can be "
                "reached, as a host and a port up to 65535; start the ranks with torchrun, which "
                "sets both.",
                where="environment",
            )
        return cls(rank, world, local, host, int(port))


class Ranks:
    """This process among all; alone, every operation is the identity."""

    def __init__(self, rank: int = 0, world: int = 1, *, grouped: bool = False) -> None:
        self.rank, self.world = rank, world
        self.grouped = grouped
        """Whether there is a process group, be it of one."""

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def sum(self, values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
        """Add up over all ranks, or those of a group, in place."""
        if self.grouped:
            dist.all_reduce(values, group=group)
        return values

    def any(self, flag: bool) -> bool:
        """Say whether any rank said yes."""
        return any(self.gather(flag)) if self.grouped else flag

    def barrier(self) -> None:
        """Wait for the others."""
        if self.grouped:
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order."""
        if not self.grouped:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def first(self, function: Callable[[], T]) -> T:
        """Let the first rank call; every rank gets its result, or its exception."""
        if not self.grouped:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except Exception as error:
                dist.broadcast_object_list([None, error])
                raise
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def each(self, function: Callable[[], T]) -> list[T]:
        """Call on every rank and return all results; the first failure is raised by every rank."""
        outcome: tuple[T | None, Exception | None]
        try:
            outcome = function(), None
        except Exception as error:
            if not self.grouped:
                raise
            outcome = None, error
        results: list[Any] = []
        for value, problem in self.gather(outcome):
            if problem is not None:
                raise problem
            results.append(value)
        return results

    def shorten_timeout(self, seconds: float) -> None:
        """From now on wait so long for the others in any collective, and no longer."""
        if self.grouped:
            for group in list(dist.distributed_c10d._world.pg_map):
                dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def name_ranks(ranks: Sequence[int]) -> str:
    """Return how a sentence names some ranks, of which it shows eight at most."""
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def start(launch: Launch | None, device: torch.device, config: ParallelConfig) -> Ranks:
    """Join the other processes, if there are any."""
    if launch is None:
        return Ranks()
    # torch keeps a record of that many collectives, to be written down when one hangs
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        rank=launch.rank,
        world_size=launch.world,
        timeout=timedelta(seconds=config.start_timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    return Ranks(launch.rank, launch.world, grouped=True)


def leave(code: int, *, together: bool) -> None:
    """End this process, if it is one of several; `together` waits for the others.

    gloo may abort while the interpreter winds down, after a correct result; so it does not.
    """
    if not dist.is_initialized():
        return
    if together:
        try:
            dist.barrier()
            dist.destroy_process_group()
        except RuntimeError:  # of any backend, for a lost or silent peer
            rank = f"rank {dist.get_rank()}"
            say(f"nemotron: {rank} has ended, but another rank has not, and does not answer")
            code = FAILED
    leave_alone(code)


def leave_alone(code: int) -> NoReturn:
    """End this process at once, whatever the others do; what it said is written."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_word(sentence: str) -> None:
    """Report to torchrun why this rank ends, so that its own report ends with the sentence.

    Source: pytorch/pytorch: torch/distributed/elastic/multiprocessing/errors/__init__.py,
    ProcessFailure.
    """
    if (path := os.environ.get("TORCHELASTIC_ERROR_FILE")) is None:
        return
    with contextlib.suppress(OSError):  # the report then says less
        Path(path).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}))


def speaker() -> str:
    """Return how this process begins a sentence about an error.

    A mistake of the user is every rank's, so the first one says it. The others wait to be ended
    with it; who still lives after that has an error of its own.
    """
    try:
        launch = Launch.of_this_process(meets=False)
    except UserError:  # that is what is being said
        return "nemotron"
    if launch is None or launch.rank == 0:
        return "nemotron"
    time.sleep(ECHO_S)
    return f"nemotron, rank {launch.rank}"
