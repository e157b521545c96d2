"""Measuring a backend beside its reference: workers take turns, and impossible results are refused.

Each of the two has a process of its own. What it returns is compared with the reference in float64
before and after it is timed. A repetition that other programs disturbed does not count.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from nemotron.ops.registry import Call
from nemotron.sol.bound import Bound, bound, score
from nemotron.sol.machine import Machine
from nemotron.sol.problems import problems
from nemotron.sol.sizes import SIZES, Rows
from nemotron.sol.worker import (
    DTYPES,
    Candidate,
    Failed,
    Timed,
    find_operation,
    find_problem,
    serve,
)

WARM_UPS = 2
KEPT, KEPT_SLOW = 7, 2
SLOW_S = 1.0
"""From which fewer repetitions must do, and the first one counts."""
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
"""Largest error in norm, of outputs and gradients."""
TOO_LARGE = {"ssd", "attention", "linear_cross_entropy"}
"""Operations whose reference loops over tokens or holds far too much at a released model's size."""


class NoFigure(Exception):
    """A backend was not measured, and the message says why."""


@dataclass(frozen=True)
class Patience:
    """How many seconds to wait for an undisturbed repetition, and what counts as one."""

    seconds: float = 60.0
    max_others: float = 0.10
    """Share of the cores."""


@dataclass(frozen=True)
class Result:
    """What was measured of one backend on one problem; times are seconds, forward and backward."""

    candidate: Candidate
    beside: str
    """The backend whose time is the score's 0.5."""
    forward: float
    both: float
    beside_both: float
    least: Bound
    separate: float
    """Seconds that the bytes moved by the operations of `beside`, one after the other, take."""
    error: float
    kept: int

    @property
    def score(self) -> float:
        """1 at the bound, 0.5 at the time of `beside`."""
        return score(self.both, self.beside_both, self.least.seconds)

    @property
    def of_bound(self) -> float:
        """The bound's share of the time."""
        return self.least.seconds / self.both

    def facts(self) -> dict[str, Any]:  # Any: numbers and texts, for JSON
        """Return what a line of JSON holds."""
        c = self.candidate
        return {
            "problem": c.name,
            "size": c.size,
            "rows": [c.rows.rows, c.rows.tokens],
            "dtype": c.dtype,
            "backend": c.backend,
            "device": c.device,
            "threads": c.threads,
            "beside": self.beside,
            "forward_s": self.forward,
            "both_s": self.both,
            "beside_s": self.beside_both,
            "bound_s": self.least.seconds,
            "binds": self.least.binds,
            "separate_s": self.separate,
            "score": self.score,
            "error": self.error,
            "kept": self.kept,
        }


def candidates(
    size: str,
    dtype: str,
    device: torch.device,
    *,
    rows: Rows | None = None,
    operations: Sequence[str] = (),
    backend: str | None = None,
) -> list[Candidate]:
    """Return for each problem of a size the backend that a training call chooses, or a named one.

    Raises:
        UserError: when a named backend is unknown.
    """
    rows = rows or SIZES[size].usual
    found = []
    for problem in problems(SIZES[size], rows):
        if operations and problem.operation not in operations:
            continue
        operation = find_operation(problem.operation)
        call = Call(device.type, DTYPES[dtype], problem.needs)
        chosen = operation.backend(backend) if backend else operation.choose(call)
        threads = torch.get_num_threads() if device.type == "cpu" else 1
        names = (operation.name, problem.label, size, rows, dtype, chosen.name)
        found.append(Candidate(*names, str(device), threads))
    return found


def beside(candidate: Candidate) -> Candidate:
    """Return what a candidate is compared with: the reference, or where it is too slow, torch."""
    operation = find_operation(candidate.operation)
    if candidate.size not in ("nano", "super") or operation.name not in TOO_LARGE:
        return replace(candidate, backend="reference")
    device = torch.device(candidate.device).type
    call = Call(device, DTYPES[candidate.dtype], find_problem(candidate, candidate.rows).needs)
    fit = [b for b in operation.backends if b.unfit(call) is None and not b.by_name]
    return replace(candidate, backend=next(b.name for b in fit if not b.packages))


def measure(candidate: Candidate, machine: Machine, patience: Patience) -> Result:
    """Check and time one backend.

    Raises:
        NoFigure: when its results are wrong, no moment is quiet, or it beats its bound.
    """
    other = beside(candidate)
    with _worker(candidate) as ours, _worker(other) as theirs:
        error = _checked(ours, candidate, seed=1)
        counted = _ask(theirs, "count", 0)
        times = _take_turns([ours, theirs], patience)
        error = max(error, _checked(ours, candidate, seed=2))
    roofs = machine.roofs(candidate.dtype, candidate.backend)
    least = bound(counted.passes, roofs)
    flops = sum(part.flops for part in counted.passes)
    mine, reference = times
    both = statistics.median(t.both for t in mine)
    if both < least.seconds:
        raise NoFigure(
            f"{both * 1e3:.3g} ms is less than the bound of {least.seconds * 1e3:.3g} ms: the "
            "roofs are too low, so measure them again (--probe), or the bound is wrong"
        )
    return Result(
        candidate,
        other.backend,
        statistics.median(t.forward for t in mine),
        both,
        statistics.median(t.both for t in reference),
        least,
        max(flops / roofs.flops, counted.moved / roofs.bandwidth),
        error,
        len(mine),
    )


@contextmanager
def _worker(candidate: Candidate) -> Iterator[Connection]:
    """Start a process that has imported torch and done nothing else, and end it."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["nemotron.sol.worker"])
    mine, other = context.Pipe()
    process = context.Process(target=serve, args=(other, candidate), daemon=True)
    process.start()
    other.close()
    try:
        yield mine
        mine.send(None)
        process.join()
    finally:
        mine.close()
        process.kill()
        process.join()
        process.close()


def _ask(worker: Connection, method: str, seed: int) -> Any:  # Any: each method's own answer
    worker.send((method, seed))
    try:
        answer = worker.recv()
    except EOFError:
        raise NoFigure("its process died") from None
    if isinstance(answer, Failed):
        raise NoFigure(answer.reason)
    return answer


def _checked(worker: Connection, candidate: Candidate, seed: int) -> float:
    error: float = _ask(worker, "check", seed)
    if not error <= TOLERANCE[candidate.dtype]:
        raise NoFigure(f"its results differ by {error:.1e} from the reference in float64")
    return error


def _take_turns(workers: Sequence[Connection], patience: Patience) -> list[list[Timed]]:
    """Let workers repeat one after the other until each has enough undisturbed repetitions."""
    kept: list[list[Timed]] = [[] for _ in workers]
    kept_last, seed = time.monotonic(), 0
    while True:
        seed += 1
        for worker, times in zip(workers, kept, strict=True):
            if len(times) >= _needed(times):
                continue
            timed = _ask(worker, "time", seed)
            if seed <= WARM_UPS and timed.both <= SLOW_S:
                kept_last = time.monotonic()
            elif timed.others <= patience.max_others:
                times.append(timed)
                kept_last = time.monotonic()
        if all(len(times) >= _needed(times) for times in kept):
            return kept
        if time.monotonic() - kept_last > patience.seconds:
            raise NoFigure(f"other programs were busy for {patience.seconds:.0f} s")


def _needed(times: Sequence[Timed]) -> int:
    return KEPT_SLOW if times and times[0].both > SLOW_S else KEPT
