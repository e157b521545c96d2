"""Ending a job whose ranks wait for ever, and saying for which rank, and in which collective.

A thread beside the main one looks twice a second where that stands. When it has not moved for too
long, the thread sounds an alarm in the store through which the processes found each other. Then
each rank's thread answers where it stands, writes down what its process does, and ends it. Whoever
sounds the alarm is seldom the one at fault, so the sentence is made of all answers.
"""

import contextlib
import faulthandler
import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from nemotron.errors import RunFailed, UserError
from nemotron.exit_codes import FAILED
from nemotron.files import open_regular, write_text
from nemotron.parallel.config import ParallelConfig
from nemotron.parallel.runtime import Ranks, leave_alone, name_ranks
from nemotron.run.appended import AppendedFile
from nemotron.run.folder import RunFolder
from nemotron.terminal import one_line, say
from nemotron.train.reliability.progress import PHASES, StepProgress
from nemotron.train.reliability.store import PatientStore, StoreSilent

POLL_S = 0.5
"""Seconds between two looks."""
ANSWER_S = 2.5
"""Seconds in which every living rank can answer an alarm: some looks."""
MARGIN_S = 30.0
"""Seconds by which a collective waits longer than the watchdog: that one says more."""
ASKING = 8
"""Ranks that ask all others after an alarm; the rest only answer."""
STORE_S = 2.0
"""Seconds that the store may take for an answer after an alarm."""
JOIN_S = 5.0
"""Seconds in which the thread ends when training has ended."""

ALARM = "watchdog/alarm"


@dataclass(frozen=True)
class Answer:
    """Where a rank stands: index of the step, part of it, seconds there, and what it waits in."""

    step: int
    phase: str
    seconds: float
    collective: str | None
    error: str | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Sorts answers as a run comes to their places."""
        return self.step, PHASES.index(self.phase)


class Watchdog:
    """Watches the main thread while it is entered, if there are other ranks."""

    def __init__(
        self, ranks: Ranks, config: ParallelConfig, folder: RunFolder, progress: StepProgress
    ) -> None:
        self._ranks, self._config, self._progress = ranks, config, progress
        self._folder = folder
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._posted: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        if self._ranks.world > 1:
            config = self._config
            # the last resort: this thread is to end the job before a collective does
            longest = max(config.start_timeout_s, config.timeout_s) + MARGIN_S
            self._ranks.shorten_timeout(longest)
            # a connection of its own: the main thread may block the other one
            default: Any = dist.distributed_c10d._get_default_store()  # its stub lacks `clone`
            store: dist.Store = default.clone()
            store.set_timeout(timedelta(seconds=STORE_S))
            self._store = PatientStore(store, config.timeout_s)
            self._post()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        self._stopped.set()
        self._thread.join(JOIN_S)  # it may wait for the store, and then has nothing more to do
        # mistakes that are found at the start are every rank's, and each says them itself
        if error is not None and not isinstance(error, UserError):
            known = isinstance(error, RunFailed)
            text = f"{error}" if known else f"{kind and kind.__name__}: {error}"
            self._conclude(" ".join(text.split())[:500])

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_S):
            try:
                self._post()
                is_over = self._is_late() or self._store.has(ALARM)
            except (StoreSilent, RuntimeError):  # the store's own errors are all of this type
                is_over = True
            if is_over and not self._stopped.is_set():
                self._conclude()
                leave_alone(FAILED)

    def _is_late(self) -> bool:
        progress, config = self._progress, self._config
        limit = config.start_timeout_s if progress.is_rare else config.timeout_s
        return time.monotonic() - progress.current.since > limit

    def _post(self) -> None:
        """Leave in the store where this rank stands, in case it cannot answer later."""
        current = self._progress.current
        if current.order != self._posted:
            self._posted = current.order
            self._store.set(_beat(self._ranks.rank), json.dumps([current.step, current.phase]))

    def _conclude(self, error: str | None = None) -> None:
        """Sound the alarm, write what this process does, and say who is behind or failed.

        One rank says it to the screen: the first of those that ask and have no `error` themselves.
        """
        rank = self._ranks.rank
        with contextlib.suppress(OSError):  # nothing may keep the job from ending
            self._dump()
        own = self._own_answer(error)
        try:
            with self._store.patience(STORE_S):
                self._store.set(_answer_of(rank), json.dumps(asdict(own)))
                self._store.set(ALARM, "")
                answers = self._collect() | {rank: own}
                lost = {r: self._last_seen(r) for r in self._asked() if r not in answers}
            sentence = verdict(answers, lost) if rank < ASKING else "the first rank's log says why"
            speaker = min(answers, key=lambda r: (answers[r].error is not None, r))
        except (StoreSilent, RuntimeError) as problem:
            sentence, speaker = without_store(own, is_silent=isinstance(problem, StoreSilent)), rank
        text = f"{sentence}; the job ends. See {self._folder.ranks}/rank-*/stacks.txt"
        self._log(one_line(text))
        if rank == speaker and rank < ASKING:
            say(f"nemotron: {text}")
            self._folder.write_status("failed", max(0, self._progress.current.step), FAILED)
        if self._ranks.is_first:
            time.sleep(POLL_S)  # the store may end with this process

    def _own_answer(self, error: str | None) -> Answer:
        current = self._progress.current
        seconds = time.monotonic() - current.since
        return Answer(current.step, current.phase, seconds, pending_collective(_flight()), error)

    def _asked(self) -> range:
        """Return the ranks that this one waits for; else a thousand would ask each other."""
        return range(self._ranks.world if self._ranks.rank < ASKING else 0)

    def _collect(self) -> dict[int, Answer]:
        """Return the answers that come in time."""
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + ANSWER_S
        missing = list(self._asked())
        while time.monotonic() < deadline and missing:
            for rank in list(missing):
                key = _answer_of(rank)
                if self._store.has(key):
                    answers[rank] = Answer(**json.loads(self._store.get(key)))
                    missing.remove(rank)
            time.sleep(0.1)
        return answers

    def _last_seen(self, rank: int) -> str:
        if not self._store.has(_beat(rank)):
            return "never seen"
        step, phase = json.loads(self._store.get(_beat(rank)))
        return f"last seen in {_place(step, phase)}"

    def _log(self, text: str) -> None:
        with contextlib.suppress(OSError, UserError):
            log = AppendedFile(self._folder.log_of(self._ranks.rank))
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n".encode())
            log.close()

    def _dump(self) -> None:
        folder = self._folder.ranks / f"rank-{self._ranks.rank}"
        folder.parent.mkdir(exist_ok=True)  # not the run's folder, which may have been removed
        folder.mkdir(exist_ok=True)
        stacks = folder / "stacks.txt"
        with open(open_regular(stacks, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        write_text(folder / "flight.json", json.dumps(_flight(), indent=1))


def verdict(answers: dict[int, Answer], lost: dict[int, str]) -> str:
    """Say in one sentence for which ranks the others wait, where those are, and in what.

    `lost` says of each rank that gave no answer where it was last seen.
    """
    failed = {rank: a for rank, a in answers.items() if a.error is not None}
    if failed and not lost:  # what breaks off when a rank dies is an error of the others
        rank, answer = min(failed.items())
        return f"rank {rank} failed in {_place(answer.step, answer.phase)}: {answer.error}"
    behind = lost or {rank: _seconds(answers[rank]) for rank in _behind(answers)}
    waiting = {rank: a for rank, a in answers.items() if rank not in behind}
    where = next(iter(behind.values()))
    verb = "does not answer" if lost else "is behind"
    text = f"{name_ranks(list(behind))} {verb if len(behind) == 1 else _plural(verb)}, {where}"
    if not waiting:
        waiting = answers
        text = f"no rank moves, {_seconds(next(iter(answers.values())))}"
    collectives = {a.collective: a for a in waiting.values() if a.collective is not None}
    if collectives:
        name, answer = next(iter(collectives.items()))
        those = [rank for rank, a in waiting.items() if a.collective == name]
        text += f"; {name_ranks(those)} wait{'s' * (len(those) == 1)} in {name} "
        text += f"({_place(answer.step, answer.phase)})"
    return text


def without_store(own: Answer, *, is_silent: bool) -> str:
    """Say why a rank ends that can ask no other one, and where it stands."""
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host = "the launcher of the first machine" if hosted else "rank 0"
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    what = (
        f"{host}, which holds the store of the ranks at {address}, does not answer"
        if is_silent
        else f"the store of the ranks at {address} is gone: {host} has ended"
    )
    where = f"in {own.collective} ({_place(own.step, own.phase)})" if own.collective else ""
    return f"{what}; this rank waits {where or _seconds(own)}"


def _behind(answers: dict[int, Answer]) -> list[int]:
    """Return the ranks that are not as far as others, or, of those, wait in no collective."""
    least = min(a.order for a in answers.values())
    last = [rank for rank, a in answers.items() if a.order == least]
    if len(last) < len(answers):
        return last
    free = [rank for rank in last if answers[rank].collective is None]
    return free or last


def pending_collective(flight: dict[str, Any]) -> str | None:  # Any: nested JSON
    """Return the collective that the process waits in, of those that it began and has not ended."""
    entries = flight.get("entries", [])
    open_ = [e for e in entries if not e["retired"] and e["state"] != "completed"]
    if not open_:
        return None
    _, group = open_[-1]["process_group"]
    known = "" if group in ("", "undefined", "default_pg") else f" of {group}"
    return f"{open_[-1]['profiling_name']}{known}"


def _flight() -> dict[str, Any]:  # Any: nested JSON
    """Return torch's record of collectives, as far as this build keeps one."""
    c10d = torch._C._distributed_c10d
    for name in ("_dump_nccl_trace_json", "_dump_fr_trace_json"):
        if (dump := getattr(c10d, name, None)) is not None:
            flight = json.loads(dump())
            if flight.get("entries"):
                return flight
    return {}


def _place(step: int, phase: str) -> str:
    return f"step {step + 1} ({phase})" if step >= 0 else phase


def _seconds(answer: Answer) -> str:
    return f"in {_place(answer.step, answer.phase)} for {answer.seconds:.0f} s"


def _plural(verb: str) -> str:
    return {"is behind": "are behind", "does not answer": "do not answer"}[verb]


def _beat(rank: int) -> str:
    return f"watchdog/beat/{rank}"


def _answer_of(rank: int) -> str:
    return f"watchdog/answer/{rank}"
