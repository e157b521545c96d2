"""What a comparison on the device found, and how the base records it."""

import datetime
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import triton

from nemotron.ops.tuning.base import Base, Binds, Entry, Lesson
from nemotron.ops.tuning.tunable import Tunable, name_of
from nemotron.tune.candidates import text
from nemotron.tune.compiled import Compiled
from nemotron.tune.timing import Timed

Item = TypeVar("Item", Entry, Lesson)
NAMED = 12
"""Candidates that a lesson names, the fastest first."""


@dataclass(frozen=True)
class Outcome:
    """What came of a candidate: its time, or why it has none."""

    us: float | None = None
    fault: str = ""
    is_repeated: bool = False
    """Whether another candidate is the same launch."""


@dataclass(frozen=True)
class Bucket:
    """A launch with the sizes and the dtype that share one entry of the base."""

    tunable: Tunable
    axes: dict[str, int]
    """Sizes, rounded to powers of two."""
    dtype: str

    @classmethod
    def of(cls, tunable: Tunable, default: Timed) -> Self:
        """Return the bucket in which the default configuration was looked up."""
        dtype, exponents = default.asked[1], default.asked[2:]
        axes = {axis: 1 << e for axis, e in zip(tunable.axes, exponents, strict=True)}
        return cls(tunable, axes, name_of(dtype))

    @property
    def key(self) -> tuple[object, ...]:
        """The bucket as a key of a dictionary."""
        return (self.tunable.name, self.dtype, *self.axes.values())

    @property
    def sizes(self) -> str:
        """The sizes in words."""
        return " ".join(f"{axis} {size}" for axis, size in self.axes.items())

    def owns(self, item: Entry | Lesson) -> bool:
        """Say whether an entry or a lesson is about this bucket."""
        own = (self.tunable.operation, self.tunable.launch, self.axes, self.dtype)
        return (item.operation, item.launch, item.axes, item.dtype) == own

    def __str__(self) -> str:
        return f"{self.tunable.name} {self.dtype} {self.sizes}"


@dataclass(frozen=True)
class Result:
    """The fastest configuration of a bucket, and what it was compared with."""

    bucket: Bucket
    best: Timed
    default: Timed
    before: Timed
    """That of the base so far, or the default."""
    spread_us: float
    floor_us: float
    binds: Binds
    num_timed: int
    """Candidates that were timed before the comparison."""
    device: str
    commit: str

    def described(self, seconds: float) -> str:
        """Return a line for the screen."""
        return (
            f"{self.bucket}: {text(self.best.configuration)}: {self.best.us:.1f} us, default "
            f"{self.default.us:.1f}, before {self.before.us:.1f} +- {self.spread_us:.1f}, floor "
            f"{self.floor_us:.1f} ({self.binds}), {self.num_timed} timed in {seconds:.1f} s"
        )

    def record_entry(self, found: Base, compiled: Compiled) -> Base:
        """Return a base that has the best configuration in place of the entry of the bucket."""
        new = Entry(
            operation=self.bucket.tunable.operation,
            launch=self.bucket.tunable.launch,
            axes=self.bucket.axes,
            dtype=self.bucket.dtype,
            configuration=dict(self.best.configuration),
            time_us=round(self.best.us, 2),
            default_us=round(self.default.us, 2),
            floor_us=max(0.01, round(self.floor_us, 2)),
            binds=self.binds,
            error=self.best.error,
            registers=compiled.registers,
            shared_bytes=compiled.shared,
            device=self.device,
            triton=triton.__version__,
            torch=torch.__version__,
            date=_today(),
            commit=self.commit,
            repetitions=len(self.best.times_us),
        )
        entry = next(filter(self.bucket.owns, found.entries), None)
        kept = [e for e in found.entries if e is not entry]
        return found.model_copy(update={"entries": _sorted([*kept, new])})

    def record_lessons(self, found: Base, tried: dict[tuple[int, ...], Outcome]) -> Base:
        """Return a base that says what was tried, in place of what this day said before."""
        bucket, today = self.bucket, _today()
        common: dict[str, Any] = {  # Any: the values of a lesson's fields
            "operation": bucket.tunable.operation,
            "launch": bucket.tunable.launch,
            "axes": bucket.axes,
            "dtype": bucket.dtype,
            "device": self.device,
            "triton": triton.__version__,
            "date": today,
            "commit": self.commit,
        }
        new = [Lesson(text=sentence, **common) for sentence in self._sentences(tried)]
        kept = [x for x in found.lessons if not (bucket.owns(x) and x.date == today)]
        return found.model_copy(update={"lessons": _sorted([*kept, *new])})

    def _sentences(self, tried: dict[tuple[int, ...], Outcome]) -> Iterable[str]:
        best, default, names = self.best, self.default, list(self.bucket.tunable.space)
        outcomes = [(text(dict(zip(names, k, strict=True))), o) for k, o in tried.items()]
        times = sorted((round(o.us, 1), number) for number, (_, o) in enumerate(outcomes) if o.us)
        timed = [f"{outcomes[number][0]}: {us:.1f} us" for us, number in times]
        failed = [f"{name} {o.fault}" for name, o in outcomes if o.fault and not o.is_repeated]
        yield (
            f"{text(best.configuration)} takes {best.us:.1f} us, {default.us / best.us:.2f} times "
            f"as fast as the default ({text(default.configuration)}: {default.us:.1f} us, spread "
            f"{self.spread_us:.1f}); the floor is {self.floor_us:.1f} us ({self.binds})"
        )
        yield f"timed: {'; '.join(timed[:NAMED])}"
        if failed:
            yield f"of no use: {'; '.join(failed[:NAMED])}"


def commit() -> str:
    """Return the commit that is checked out, or nothing outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return ran.stdout.strip()


def _sorted(items: Sequence[Item]) -> tuple[Item, ...]:
    return tuple(sorted(items, key=lambda e: (e.operation, e.launch, e.dtype, str(e.axes))))


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
