"""Verifies responses, and runs tools, in worker processes that are killed when they take too long.

A verifier runs code of libraries over text of a model: it may loop, crash or be killed for its
memory. None of that says anything about the answer, so such a sample is left out of the loss and
counted.
"""

import queue
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nemotron.posttrain.environments.base import Response, Row, Verdict, environment_of
from nemotron.posttrain.environments.wire import fault, read_verdict
from nemotron.posttrain.workers import Worker, WorkerFault

Result = TypeVar("Result")

MAX_BATCH = 64
"""Most jobs that a process is given at once."""


@dataclass(frozen=True)
class Beginning:
    """What a conversation with tools begins with."""

    state: Any = None  # Any: JSON, what the environment makes of it
    has_tools: bool = False
    """Whether the environment runs tools; if not, it judges what calls say."""
    fault: str | None = None
    """Why there is none."""


@dataclass(frozen=True)
class ToolCalls:
    """Calls of one turn, and the state in which they are made."""

    row: Row
    state: Any  # Any: JSON
    calls: list[dict[str, Any]]
    """Name and arguments of each."""


@dataclass(frozen=True)
class Called:
    """What the tools said to the calls of a turn, and the state after them."""

    said: list[str] = field(default_factory=list)
    state: Any = None  # Any: JSON
    fault: str | None = None
    """Why the tools said nothing."""


class Verifiers:
    """A pool of processes that judge; each loads an environment once and keeps it."""

    def __init__(
        self,
        workers: int,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        kinds: Mapping[str, str] | None = None,
    ) -> None:
        """`options` holds what `find_environment` is given, by the name that rows have.

        `kinds` holds the environment behind each such name, where it has another one.
        """
        self.faults: Counter[str] = Counter()
        """Samples that could not be judged, by environment."""
        self._options = {name: dict(given) for name, given in (options or {}).items()}
        self._kinds = dict(kinds or {})
        self._workers = workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verify")
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(Worker())

    def __enter__(self) -> "Verifiers":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def verify(
        self,
        rows: Sequence[Row],
        responses: Sequence[Response],
        states: Sequence[Any],
        timeout_s: float,
        faults: Sequence[str | None] | None = None,
    ) -> list[Verdict]:
        """Return the verdict of each response; one that took longer than `timeout_s` is a fault.

        `faults` are what went wrong before, with which a response is not judged.
        """
        given = faults or [None] * len(rows)
        found = iter(
            self._map(
                [
                    self._job("verify", row, response=response, state=state)
                    for row, response, state, problem in zip(
                        rows, responses, states, given, strict=True
                    )
                    if problem is None
                ],
                read_verdict,
                lambda problem: fault(f"the verifier {problem}"),
                timeout_s,
            )
        )
        verdicts = [next(found) if problem is None else fault(problem) for problem in given]
        for row, verdict in zip(rows, verdicts, strict=True):
            self.faults[environment_of(row)] += verdict.error is not None
        return verdicts

    def begin(self, rows: Sequence[Row], timeout_s: float) -> list[Beginning]:
        """Return what conversations about the rows begin with."""
        return self._map(
            [self._job("begin", row) for row in rows],
            lambda found: Beginning(found["state"], found["has_tools"]),
            lambda problem: Beginning(fault=f"the environment {problem}"),
            timeout_s,
        )

    def call(self, calls: Sequence[ToolCalls], timeout_s: float) -> list[Called]:
        """Run the calls of each conversation in their order."""
        return self._map(
            [self._job("call", each.row, state=each.state, calls=each.calls) for each in calls],
            lambda found: Called(found["said"], found["state"]),
            lambda problem: Called(fault=f"a tool {problem}"),
            timeout_s,
        )

    def close(self) -> None:
        """End all processes."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().close()

    def _map(
        self,
        jobs: Sequence[dict[str, Any]],
        read: Callable[[Any], Result],
        fail: Callable[[str], Result],
        timeout_s: float,
    ) -> list[Result]:
        """Have all jobs done at the same time, as far as there are processes."""

        # several times as many as processes, so that none waits long for the last one
        size = max(min(MAX_BATCH, -(-len(jobs) // (4 * self._workers))), 1)
        waiting = [
            self._threads.submit(self._ask, jobs[first : first + size], timeout_s)
            for first in range(0, len(jobs), size)
        ]
        answers = [answer for each in waiting for answer in each.result()]
        return [
            fail(answer.problem) if isinstance(answer, WorkerFault) else read(answer)
            for answer in answers
        ]

    def _ask(self, jobs: Sequence[dict[str, Any]], timeout_s: float) -> list[Any]:
        """Return the answer to each job, a `WorkerFault` where there is none."""
        worker = self._idle.get()
        answers: list[Any] = []
        try:
            while len(answers) < len(jobs):  # a fault ends the process, and others go on
                answers += worker.ask(jobs[len(answers) :], timeout_s)
        finally:
            self._idle.put(worker)
        return answers

    def _job(self, kind: str, row: Row, **more: Any) -> dict[str, Any]:
        name = environment_of(row)
        made = {"made_as": self._kinds.get(name, name), "options": self._options.get(name, {})}
        return {"kind": kind, "environment": name, **made, "row": row, **more}
