"""The device that is measured and its clock: events on a GPU, the wall's time on a CPU."""

import os
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

from nemotron.device import Mark, mark, seconds_between

FLUSHED_BYTES = 128 << 20
"""Written before each repetition: more than twice the 50 to 60 MB of cache of a Hopper GPU, and of
what one program gets of a server's CPU."""
CYCLES_PER_MS = 1_700_000
"""Of a GPU that is held back while the host queues work; about its clock under load."""


class Clock:
    """Marks points in the work of one device and measures the time between them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_gpu = device.type == "cuda"
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)

    def mark(self) -> Mark:
        """Mark this point of the work that was queued."""
        return mark(self.device)

    def wait(self) -> None:
        """Wait until all that was queued is done."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, marks: Sequence[Mark]) -> list[float]:
        """Return the times between neighboring marks; waits for the last one."""
        return [1e3 * seconds for seconds in seconds_between(marks)]

    def flush(self) -> None:
        """Drive everything out of the caches."""
        self._flushed.zero_()

    def hold(self, milliseconds: float = 1.0) -> None:
        """Keep the GPU busy, so that the host's time to queue small work is not counted."""
        if self.is_gpu:
            torch.cuda._sleep(int(milliseconds * CYCLES_PER_MS))

    def begin_peak(self) -> None:
        """Count peak memory from here on."""
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float:
        """Return peak memory: of tensors on a GPU, of the process on a CPU."""
        if self.is_gpu:
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def repeat(
    run: Callable[[int], list[float]], seconds: float, at_least: int = 3, at_most: int = 25
) -> list[list[float]]:
    """Call `run` with rising numbers until the time is over; the first call is not kept.

    A second call that takes a quarter of the time is all that there is.
    """
    run(0)
    kept: list[list[float]] = []
    begin = time.monotonic()
    while True:
        kept.append(run(len(kept) + 1))
        spent = time.monotonic() - begin
        if spent > seconds and (len(kept) >= at_least or spent > 2 * seconds):
            return kept
        if len(kept) >= at_most:
            return kept


@dataclass
class Watch:
    """Measures wall time and the share of the cores that other processes used meanwhile."""

    seconds: float = 0.0
    others: float = 0.0
    """0 where the system does not count them."""
    _begin: tuple[float, float, float] = field(default=(0.0, 0.0, 0.0))

    def __enter__(self) -> Self:
        self._begin = (time.perf_counter(), _busy_seconds(), _own_seconds())
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, own = self._begin
        self.seconds = time.perf_counter() - wall
        others = (_busy_seconds() - busy) - (_own_seconds() - own)
        # the kernel counts in hundredths of a second, so tiny negatives are rounding
        self.others = max(others, 0.0) / (self.seconds * (os.cpu_count() or 1))


def _busy_seconds() -> float:
    """Seconds that all cores together worked since boot, stolen time included."""
    table = Path("/proc/stat")
    if not table.exists():
        return 0.0
    user, nice, system, _idle, _wait, irq, softirq, steal = map(
        int, table.read_text().split("\n", 1)[0].split()[1:9]
    )
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system
