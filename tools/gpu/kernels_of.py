"""What the GPU did during a step: kernels by time, launches, idle time, and who made it wait."""

import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch
from stage import ROOT

from nemotron.sol.clock import Clock

OWN = ("nemotron", "tools")
WAITS = "called a synchronizing CUDA operation"
"""What torch says where the host waits."""
LABELS = ("Optimizer.", "ProfilerStep", "## ")
"""Starts of names of stretches of time that are not kernels."""


def profile(run: Callable[[], object], clock: Clock, out: Path, top: int = 12) -> dict[str, Any]:
    """Run once under torch's profiler, write the table of kernels and return its head.

    On a CPU the events are those of torch's operations, which overlap.
    """
    kind = "CUDA" if clock.is_gpu else "CPU"
    activities = [getattr(torch.profiler.ProfilerActivity, kind)]
    with torch.profiler.profile(activities=activities) as found:
        run()
        clock.wait()
    spans: list[tuple[int, int]] = []
    time_of: dict[str, int] = defaultdict(int)
    count_of: Counter[str] = Counter()
    for event in found.profiler.kineto_results.events():
        begin, name = event.start_ns(), event.name()
        if event.device_type() != getattr(torch.autograd.DeviceType, kind):
            continue
        if not event.duration_ns() or name.startswith(LABELS):
            continue
        spans.append((begin, begin + event.duration_ns()))
        time_of[name] += event.duration_ns()
        count_of[name] += 1
    if not spans:
        return {"launches": 0}
    busy, total = covered(spans), sum(time_of.values())
    span = max(end for _, end in spans) - min(begin for begin, _ in spans)
    order = sorted(time_of, key=lambda name: -time_of[name])
    rows = [(time_of[n] / 1e6, time_of[n] / total, count_of[n], n) for n in order]
    lines = [f"{ms:9.3f} ms {share:6.1%} {count:6d} x {name}" for ms, share, count, name in rows]
    out.write_text("\n".join(lines) + "\n")
    return {
        "launches": sum(count_of.values()),
        "busy_ms": round(busy / 1e6, 2),
        "span_ms": round(span / 1e6, 2),
        "idle": round(1 - busy / span, 4),
        "top": [
            f"{ms:.2f} ms {share:.1%} {count}x {_short(n)}" for ms, share, count, n in rows[:top]
        ],
    }


def covered(spans: list[tuple[int, int]]) -> int:
    """Return the length of the union of intervals."""
    total, end = 0, 0
    for begin, stop in sorted(spans):
        total += max(0, stop - max(begin, end))
        end = max(end, stop)
    return total


def _short(name: str) -> str:
    """Cut the arguments and name spaces of a kernel's name."""
    for part in ("void ", "at::native::", "(anonymous namespace)::"):
        name = name.replace(part, "")
    return name[:60]


@contextmanager
def host_waits(found: Counter[str]) -> Iterator[None]:
    """Count each place in our code at which the host waits for the GPU.

    What waits in a backward pass written in Python is reported by torch when backward returns, so
    it counts for the line that called backward.
    """

    def note(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if WAITS not in str(message):
            return
        frames = [f for f in traceback.extract_stack()[:-1] if _is_own(f.filename)]
        where = [f"{Path(f.filename).relative_to(ROOT)}:{f.lineno}" for f in frames[-2:]]
        found[" < ".join(reversed(where)) or f"{Path(filename).name}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")


def _is_own(filename: str) -> bool:
    path = Path(filename)
    return path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OWN
