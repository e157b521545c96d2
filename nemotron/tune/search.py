"""Search: compile what may be better, time what is left, keep the best and what was learned."""

import datetime
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import triton

from nemotron.ops.tuning import base
from nemotron.ops.tuning.base import Base, Binds, Entry, Lesson
from nemotron.ops.tuning.tunable import Configuration, Tunable, name_of
from nemotron.sol.sizes import Size
from nemotron.tune.candidates import order, text
from nemotron.tune.compiled import Compiled, Job
from nemotron.tune.problems import Target
from nemotron.tune.timing import TOLERANCE, NotLaunched, Timed

FIRST_BATCH, NEXT_BATCH = 12, 6
"""Candidates of a launch that are compiled in the first round, and in each later one."""
COMPILING = 0.55
"""Share of a round's time after which candidates that are not compiled are left for later."""
QUICK, DUEL = 7, 24
"""Repetitions of every candidate, and more of the best and of what it must beat."""
FINALISTS = 3
Item = TypeVar("Item", Entry, Lesson)
LEAST_ROUND_S = 12.0
"""A round that has less time is not begun."""


class Compiler(Protocol):
    """What compiles candidates: `compiled.Pool`, or a test's stand-in."""

    def compile(self, jobs: Sequence[Job], until: float) -> dict[int, Compiled]:
        """Return by number what was compiled before a time of `time.monotonic`."""


class Device(Protocol):
    """What times candidates: `timing.Timer`, or a test's stand-in."""

    name: str

    def begin(self, target: Target) -> Timed:
        """Draw inputs; return the default."""

    def end(self) -> None:
        """Free the inputs."""

    def capture(self, configuration: Configuration) -> Timed:
        """Make a candidate ready and compare its results with the default's."""

    def time(self, candidates: Sequence[Timed], repetitions: int) -> None:
        """Add times to the candidates'."""

    def floor(self, timed: Timed) -> tuple[float, Binds]:
        """Return the least microseconds, and what binds."""


@dataclass(frozen=True)
class Outcome:
    """What came of a candidate: its time, or why it has none."""

    us: float | None = None
    fault: str = ""
    is_repeated: bool = False
    """Whether another candidate is the same launch."""


@dataclass
class State:
    """What a search knows of one target."""

    target: Target
    best: Configuration
    """In the base, or the default; later rounds begin at what was found."""
    known: Sequence[Configuration]
    tried: dict[tuple[int, ...], "Outcome"] = field(default_factory=dict)
    compiled: dict[tuple[int, ...], Compiled] = field(default_factory=dict)
    launches: set[tuple[str, ...]] = field(default_factory=set)
    is_absent: bool = False
    """Whether these sizes do without the launch."""
    note: str = ""


class Search:
    """A search over targets within a time; `found` is the base with what it changed."""

    def __init__(
        self,
        targets: Sequence[Target],
        found: Base,
        device: Device,
        compiler: Compiler,
        say: Callable[[str], None],
        keep: Callable[[Base], None],
    ) -> None:
        self.found, self._say, self._keep = found, say, keep
        self._device, self._compiler = device, compiler
        self._states = [self._begin(target) for target in targets]
        self.settled: dict[tuple[object, ...], Size] = {}
        """Which sizes were searched for each bucket: others in it are left alone."""
        self._commit = commit()

    def run(self, seconds: float) -> None:
        """Work in rounds until the time is over or nothing is left to try."""
        end = time.monotonic() + seconds
        size = FIRST_BATCH
        while end - time.monotonic() >= LEAST_ROUND_S or size == FIRST_BATCH:
            left = end - time.monotonic()
            if not self._round(size, time.monotonic() + COMPILING * left, end):
                break
            size = NEXT_BATCH
        self._device.end()

    def _begin(self, target: Target) -> State:
        tunable = target.tunable
        near = [
            e.configuration
            for e in self.found.entries
            if (e.operation, e.launch) == (tunable.operation, tunable.launch)
            and tunable.accepts(e.configuration)
        ]
        return State(target, tunable.default(torch.bfloat16), near)

    def _round(self, size: int, compiled_by: float, end: float) -> bool:
        batches = [self._batch(state, size) for state in self._states]
        # each target's first candidates before any target's last ones
        jobs = [
            (state, batch[place])
            for place in range(size)
            for state, batch in zip(self._states, batches, strict=True)
            if place < len(batch)
        ]
        if not jobs:
            return False
        begin = time.monotonic()
        results = self._compiler.compile([(s.target, c) for s, c in jobs], compiled_by)
        took = time.monotonic() - begin
        self._say(f"compiled {len(results)} of {len(jobs)} candidates in {took:.1f} s")
        ready: dict[int, list[Configuration]] = {}
        for number, found in results.items():
            state, configuration = jobs[number]
            if self._is_worth_timing(state, configuration, found):
                ready.setdefault(id(state), []).append(configuration)
        for place, state in enumerate(self._states):
            if id(state) not in ready or state.is_absent:
                continue
            left = end - time.monotonic()
            if left < 1.0:
                self._say(f"no time left for {len(self._states) - place} launches of this round")
                break
            try:
                self._time(state, ready[id(state)], time.monotonic() + max(left / 3, 2.0))
            except NotLaunched as problem:
                state.is_absent = True
                self._say(str(problem))
            except Exception as problem:
                # whatever is wrong with one operation, the others can be searched
                if _is_fatal(problem):
                    raise
                state.is_absent = True
                self._say(f"ERROR {state.target.tunable.name}: {_one_line(problem)}")
                traceback.print_exc()
        return True

    def _batch(self, state: State, size: int) -> list[Configuration]:
        if state.is_absent:
            return []
        tunable = state.target.tunable
        binds = "compute" if state.target.problem.flops(state.target.sizes) else "memory"
        found: list[Configuration] = []
        for configuration in order(tunable, state.best, state.known, binds):
            if _key(tunable, configuration) not in state.tried and len(found) < size:
                found.append(configuration)
        return found

    def _is_worth_timing(self, state: State, configuration: Configuration, found: Compiled) -> bool:
        key = _key(state.target.tunable, configuration)
        state.compiled[key] = found
        state.tried[key] = Outcome(fault=found.unfit())
        state.is_absent = state.is_absent or found.is_absent
        if found.unfit():
            return False
        if found.launches in state.launches and found.launches:
            state.tried[key] = Outcome(fault="is the same launch as another", is_repeated=True)
            return False
        state.launches.add(found.launches)
        return True

    def _time(self, state: State, configurations: list[Configuration], end: float) -> None:
        target, device = state.target, self._device
        tunable = target.tunable
        default = device.begin(target)
        dtype, buckets = default.asked[1], default.asked[2:]
        axes = {axis: 1 << size for axis, size in zip(tunable.axes, buckets, strict=True)}
        bucket = (tunable.name, dtype, *buckets)
        if self.settled.setdefault(bucket, target.sizes) != target.sizes:
            state.is_absent = True
            self._say(f"{tunable.name}: {_places(axes)} was searched at other sizes")
            return
        entry = next((e for e in self.found.entries if _is_of(e, tunable, axes, dtype)), None)
        holder = default
        if entry is not None and _is_other(tunable, entry.configuration, default):
            holder = device.capture(entry.configuration)
        taken = {_key(tunable, c.configuration) for c in (default, holder)}
        others: list[Timed] = []
        count, begin = 0, time.monotonic()
        for configuration in configurations:
            key = _key(tunable, configuration)
            if key in taken:
                continue
            if time.monotonic() > end:
                # is tried again in the next round
                state.tried.pop(key, None)
                state.launches.discard(state.compiled[key].launches)
                continue
            try:
                candidate = device.capture(configuration)
            except (RuntimeError, triton.OutOfResources) as problem:
                state.tried[key] = Outcome(fault=f"cannot be launched ({_one_line(problem)})")
                if _is_fatal(problem):
                    raise
                continue
            if candidate.error > TOLERANCE:
                state.tried[key] = Outcome(fault=f"gives other results ({candidate.error:.1e})")
                self._say(f"WRONG {tunable.name}: {text(configuration)}: {candidate.error:.1e}")
                continue
            device.time([candidate], QUICK)
            state.tried[key] = Outcome(us=candidate.us)
            count += 1
            # the launches of the others hold memory
            others = sorted([*others, candidate], key=lambda c: c.us)[:FINALISTS]
        finalists = [holder, *others] if holder is default else [holder, default, *others]
        for finalist in finalists:
            finalist.times_us.clear()
        device.time(finalists, DUEL)
        best = min(finalists, key=lambda c: c.us)
        spread = max(holder.spread_us, best.spread_us)
        if holder.us - best.us <= 2 * spread:
            best = holder
        state.best = best.configuration
        state.known = [c.configuration for c in others]
        for finalist in finalists:
            state.tried[_key(tunable, finalist.configuration)] = Outcome(us=finalist.us)
        floor, binds = device.floor(default)
        self._say(
            f"{tunable.name} {name_of(dtype)} {_places(axes)}: {text(best.configuration)}: "
            f"{best.us:.1f} us, default {default.us:.1f}, before {holder.us:.1f} +- {spread:.1f}, "
            f"floor {floor:.1f} ({binds}), {count} timed in {time.monotonic() - begin:.1f} s"
        )
        is_stale = entry is not None and not tunable.accepts(entry.configuration)
        if entry is None or is_stale or best is not holder:
            compiled = state.compiled.get(_key(tunable, best.configuration), Compiled())
            new = Entry(
                operation=tunable.operation,
                launch=tunable.launch,
                axes=axes,
                dtype=name_of(dtype),
                configuration=dict(best.configuration),
                time_us=round(best.us, 2),
                default_us=round(default.us, 2),
                floor_us=max(0.01, round(floor, 2)),
                binds=binds,
                error=best.error,
                registers=compiled.registers,
                shared_bytes=compiled.shared,
                device=device.name,
                triton=triton.__version__,
                torch=torch.__version__,
                date=_today(),
                commit=self._commit,
                repetitions=len(best.times_us),
            )
            kept = [e for e in self.found.entries if e is not entry]
            self.found = self.found.model_copy(update={"entries": _sorted([*kept, new])})
        self._learn(state, axes, name_of(dtype), best, default, floor, binds, spread)
        device.end()
        self._keep(self.found)

    def _learn(
        self,
        state: State,
        axes: dict[str, int],
        dtype: str,
        best: Timed,
        default: Timed,
        floor: float,
        binds: str,
        spread: float,
    ) -> None:
        """Write down what was tried for this launch in place of what was written before."""
        tunable = state.target.tunable
        names = list(tunable.space)
        tried = [(text(dict(zip(names, k, strict=True))), what) for k, what in state.tried.items()]
        times = sorted((round(w.us, 1), number) for number, (_, w) in enumerate(tried) if w.us)
        slow = [f"{tried[number][0]}: {us:.1f} us" for us, number in times]
        failed = [f"{c} {w.fault}" for c, w in tried if w.fault and not w.is_repeated]
        gain = default.us / best.us
        sentences = [
            f"{text(best.configuration)} takes {best.us:.1f} us, {gain:.2f} times as fast as the "
            f"default ({text(default.configuration)}: {default.us:.1f} us, spread {spread:.1f}); "
            f"the floor is {floor:.1f} us ({binds})",
            f"timed: {'; '.join(slow[:12])}",
        ]
        if failed:
            sentences.append(f"of no use: {'; '.join(failed[:12])}")
        common = {
            "operation": tunable.operation,
            "launch": tunable.launch,
            "axes": axes,
            "dtype": dtype,
            "device": self._device.name,
            "triton": triton.__version__,
            "date": _today(),
            "commit": self._commit,
        }
        new = [Lesson(text=sentence, **common) for sentence in sentences]
        kept = [
            lesson
            for lesson in self.found.lessons
            if (lesson.operation, lesson.launch, lesson.axes, lesson.dtype, lesson.date)
            != (tunable.operation, tunable.launch, axes, dtype, _today())
        ]
        self.found = self.found.model_copy(update={"lessons": tuple(_sorted([*kept, *new]))})


def verify(
    targets: Sequence[Target], found: Base, device: Device, say: Callable[[str], None]
) -> list[str]:
    """Time each entry that a target falls into against the default; return complaints."""
    complaints, checked = [], set()
    for target in targets:
        tunable = target.tunable
        try:
            default = device.begin(target)
        except NotLaunched:
            continue
        dtype, buckets = default.asked[1], default.asked[2:]
        axes = {axis: 1 << size for axis, size in zip(tunable.axes, buckets, strict=True)}
        for entry in found.entries:
            if not _is_of(entry, tunable, axes, dtype) or id(entry) in checked:
                continue
            checked.add(id(entry))
            where = f"{tunable.name} {entry.dtype} {_places(axes)}"
            if not tunable.accepts(entry.configuration):
                complaints.append(f"{where}: the kernel has other parameters now; tune it again")
                continue
            candidate = device.capture(entry.configuration)
            device.time([default, candidate], DUEL)
            spread = max(default.spread_us, candidate.spread_us)
            say(f"{where}: {candidate.us:.1f} us, default {default.us:.1f} +- {spread:.1f}")
            if candidate.error > TOLERANCE:
                complaints.append(f"{where}: WRONG by {candidate.error:.1e}")
            elif candidate.us - default.us > 2 * spread:
                complaints.append(
                    f"{where}: SLOWER, {candidate.us:.1f} us against the default's {default.us:.1f}"
                )
        device.end()
    rest = len(found.entries) - len(checked)
    if rest:
        say(f"{rest} entries are of other shapes than those given; they were not checked")
    return complaints


def _is_other(tunable: Tunable, configuration: Configuration, default: Timed) -> bool:
    """Say whether an entry can be launched and is not the default."""
    return tunable.accepts(configuration) and configuration != default.configuration


def _key(tunable: Tunable, configuration: Configuration) -> tuple[int, ...]:
    return tuple(configuration[name] for name in tunable.space)


def _is_of(entry: Entry, tunable: Tunable, axes: dict[str, int], dtype: torch.dtype) -> bool:
    return (entry.operation, entry.launch, entry.axes, entry.dtype) == (
        tunable.operation,
        tunable.launch,
        axes,
        name_of(dtype),
    )


def _sorted(items: Sequence[Item]) -> tuple[Item, ...]:
    return tuple(sorted(items, key=lambda e: (e.operation, e.launch, e.dtype, str(e.axes))))


def _places(axes: dict[str, int]) -> str:
    return " ".join(f"{axis} {size}" for axis, size in axes.items())


def _is_fatal(problem: Exception) -> bool:
    """Say whether nothing works in this process any more."""
    return "CUDA error" in str(problem) or "illegal memory" in str(problem)


def _one_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:120]


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def commit() -> str:
    """Return the commit that is checked out, or nothing outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return ran.stdout.strip()


def architecture(device: torch.device) -> str:
    """Return the name of a GPU's file."""
    found = base.architecture_of(device)
    assert found is not None, device
    return found
