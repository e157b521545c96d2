"""Which rank the others wait for: what each does by itself, compared at every log interval.

Inside forward and backward, sharded ranks wait for each other all the time, so their times are
alike whoever is slow. They differ in what comes between: reading rows, the update, and
a product of fixed size that shows a slow device.
"""

import statistics
import time

import torch

from nemotron.device import synchronize
from nemotron.parallel.runtime import Ranks
from nemotron.run.metrics import Record
from nemotron.train.config import ReliabilityConfig
from nemotron.train.reliability.progress import Stopwatch

OWN_PARTS = ("data", "forward_backward", "optimizer")
"""Parts of a step that are a rank's own, as its stopwatch names them; the others are waiting."""
PROBE = "a product of fixed size"

PROBE_SIZE = {"cpu": 192, "cuda": 2048}
"""Rows and columns of the matrices of the probe: around a millisecond."""
PROBES = 3
"""Products, of which the fastest counts: another process may disturb one."""


class Stragglers:
    """Seconds of this rank since the last report, and who was slow in the last ones."""

    def __init__(self, config: ReliabilityConfig, ranks: Ranks, device: torch.device) -> None:
        self._factor, self._after = config.straggler_factor, config.straggler_after
        self._ranks, self._device = ranks, device
        self._watches: list[Stopwatch] = []
        self._slow: list[int] = []
        """The slow rank of each of the last intervals, all the same one."""

    @property
    def measures(self) -> bool:
        """Whether there is anything to compare."""
        return self._factor is not None and self._ranks.world > 1

    def add(self, watch: Stopwatch) -> None:
        """Take in a step, whose seconds are read when they are compared."""
        if self.measures:
            self._watches.append(watch)

    def report(self) -> tuple[Record, str | None]:
        """Compare the ranks since the last report, in one exchange.

        Returns metrics, and a sentence when the same rank has been slow often enough.
        """
        if not self.measures:
            return {}, None
        steps, self._watches = [watch.seconds for watch in self._watches], []
        own = [statistics.fmean(seconds[part] for seconds in steps) for part in OWN_PARTS]
        own.append(self._probe())
        table = torch.zeros(self._ranks.world, len(own), dtype=torch.float64, device=self._device)
        table[self._ranks.rank] = torch.tensor(own, dtype=torch.float64)
        rank, part, factor, seconds = slowest(self._ranks.sum(table).tolist())
        return {"ranks/slowest": rank, "ranks/max_over_median": factor}, self._judge(
            rank, factor, f"most in {part} ({seconds:.3g} s)"
        )

    def _judge(self, rank: int, factor: float, where: str) -> str | None:
        assert self._factor is not None
        if factor <= self._factor:
            self._slow = []
            return None
        self._slow = [*self._slow, rank] if rank in self._slow else [rank]
        if len(self._slow) < self._after:
            return None
        self._slow = []
        return (
            f"rank {rank} is slow: {factor:.2f} times the median of the ranks, {self._after} "
            f"intervals in a row, {where}"
        )

    def _probe(self) -> float:
        size = PROBE_SIZE[self._device.type]
        a = torch.ones(size, size, device=self._device)
        seconds = []
        for _ in range(PROBES):
            synchronize(self._device)
            start = time.perf_counter()
            a @ a
            synchronize(self._device)
            seconds.append(time.perf_counter() - start)
        return min(seconds)


def slowest(table: list[list[float]]) -> tuple[int, str, float, float]:
    """Return the slowest rank, the part that makes it so, its factor, and its seconds there.

    Each row has a rank's seconds for `OWN_PARTS`, which are judged together, and for the probe. Of
    an even number of ranks, the median is the faster one in the middle.
    """
    step = [sum(row[:-1]) for row in table]
    probe = [row[-1] for row in table]
    by_step, by_probe = ([s / statistics.median_low(v) for s in v] for v in (step, probe))
    if max(by_probe) > max(by_step):
        rank = by_probe.index(max(by_probe))
        return rank, PROBE, by_probe[rank], probe[rank]
    rank = by_step.index(max(by_step))
    excess = [
        table[rank][column] - statistics.median_low([row[column] for row in table])
        for column in range(len(OWN_PARTS))
    ]
    column = excess.index(max(excess))
    return rank, OWN_PARTS[column], by_step[rank], table[rank][column]
