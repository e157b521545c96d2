"""The machine under a benchmark: who else is busy on it, and how fast it multiplies matrices."""

import os
import platform
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch


@dataclass
class Watch:
    """Measures wall time and the share of the cores that other processes used meanwhile."""

    seconds: float = 0.0
    others: float = 0.0
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
    user, nice, system, _idle, _wait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def matmul_peak(dtype: torch.dtype, size: int = 2048) -> tuple[float, float]:
    """Return the best FLOP/s of a square product over two seconds, and the others' share then."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    torch.mm(a, b)
    best, others = 0.0, 1.0
    end = time.perf_counter() + 2
    while time.perf_counter() < end:
        with Watch() as watch:
            torch.mm(a, b)
        best, others = max((best, others), (2 * size**3 / watch.seconds, watch.others))
    return best, others


def copy_bandwidth(size: int = 1 << 26) -> float:
    """Return bytes read and written per second when memory much larger than caches is copied."""
    source, target = torch.ones(size), torch.empty(size)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - start))
    return best


def describe() -> dict[str, object]:
    """Name processor, memory, versions and commit, for the line that `--json` appends."""
    import transformers

    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    git = ["git", "-C", str(Path(__file__).parent)]
    commit, changed = (
        subprocess.run([*git, *arguments], capture_output=True, text=True, check=False).stdout
        for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"])
    )
    return {
        "commit": commit.strip() or None,
        "uncommitted_changes": bool(changed.strip()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "system": platform.platform(),
    }
