"""Search: compile what may be better, time what is left, keep the best and what was learned."""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import triton

from nemotron.ops.tuning.base import Base, Binds
from nemotron.ops.tuning.tunable import Configuration, Tunable
from nemotron.sol.sizes import Size
from nemotron.tune.candidates import order, text
from nemotron.tune.compiled import Compiled, Job
from nemotron.tune.problems import Target
from nemotron.tune.result import Bucket, Outcome, Result, commit
from nemotron.tune.timing import TOLERANCE, NotLaunched, Timed

FIRST_BATCH, NEXT_BATCH = 12, 6
"""Candidates of a launch that are compiled in the first round, and in each later one."""
COMPILING = 0.55
"""Share of a round's time after which candidates that are not compiled are left for later."""
QUICK, DUEL = 7, 24
"""Repetitions of every candidate, and more of the best and of what it must beat."""
FINALISTS = 3
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


@dataclass
class State:
    """What a search knows of one target."""

    target: Target
    best: Configuration
    """In the base, or the default; later rounds begin at what was found."""
    known: Sequence[Configuration]
    tried: dict[tuple[int, ...], Outcome] = field(default_factory=dict)
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
        """Time the candidates of a launch until `end`, and record the best configuration."""
        target, device = state.target, self._device
        tunable = target.tunable
        default = device.begin(target)
        bucket = Bucket.of(tunable, default)
        if self.settled.setdefault(bucket.key, target.sizes) != target.sizes:
            state.is_absent = True
            self._say(f"{tunable.name}: {bucket.sizes} was searched at other sizes")
            return
        entry = next(filter(bucket.owns, self.found.entries), None)
        before = default
        if entry is not None and _is_other(tunable, entry.configuration, default):
            before = device.capture(entry.configuration)
        taken = {_key(tunable, c.configuration) for c in (default, before)}
        new = [c for c in configurations if _key(tunable, c) not in taken]
        begin = time.monotonic()
        others, num_timed = self._fastest(state, new, end)
        result = self._compare(bucket, default, before, others, num_timed)
        best = result.best
        state.best, state.known = best.configuration, [c.configuration for c in others]
        for finalist in (before, default, *others):
            state.tried[_key(tunable, finalist.configuration)] = Outcome(us=finalist.us)
        self._say(result.described(time.monotonic() - begin))
        is_stale = entry is not None and not tunable.accepts(entry.configuration)
        if entry is None or is_stale or best is not before:
            compiled = state.compiled.get(_key(tunable, best.configuration), Compiled())
            self.found = result.record_entry(self.found, compiled)
        self.found = result.record_lessons(self.found, state.tried)
        device.end()
        self._keep(self.found)

    def _fastest(
        self, state: State, configurations: list[Configuration], end: float
    ) -> tuple[list[Timed], int]:
        """Time candidates briefly; return the fastest, and how many were timed."""
        tunable, device = state.target.tunable, self._device
        fastest: list[Timed] = []
        num_timed = 0
        for configuration in configurations:
            key = _key(tunable, configuration)
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
            num_timed += 1
            # the launches of the others hold memory
            fastest = sorted([*fastest, candidate], key=lambda c: c.us)[:FINALISTS]
        return fastest, num_timed

    def _compare(
        self, bucket: Bucket, default: Timed, before: Timed, others: list[Timed], num_timed: int
    ) -> Result:
        """Time the finalists in turn; a new one must beat that of before by twice the spread."""
        finalists = [before, *others] if before is default else [before, default, *others]
        for finalist in finalists:
            finalist.times_us.clear()
        self._device.time(finalists, DUEL)
        best = min(finalists, key=lambda c: c.us)
        spread = max(before.spread_us, best.spread_us)
        if before.us - best.us <= 2 * spread:
            best = before
        floor, binds = self._device.floor(default)
        return Result(
            bucket,
            best,
            default,
            before,
            spread_us=spread,
            floor_us=floor,
            binds=binds,
            num_timed=num_timed,
            device=self._device.name,
            commit=self._commit,
        )


def _is_other(tunable: Tunable, configuration: Configuration, default: Timed) -> bool:
    """Say whether an entry can be launched and is not the default."""
    return tunable.accepts(configuration) and configuration != default.configuration


def _key(tunable: Tunable, configuration: Configuration) -> tuple[int, ...]:
    return tuple(configuration[name] for name in tunable.space)


def _is_fatal(problem: Exception) -> bool:
    """Say whether nothing works in this process any more."""
    return "CUDA error" in str(problem) or "illegal memory" in str(problem)


def _one_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:120]
