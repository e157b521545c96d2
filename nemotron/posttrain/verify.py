"""Verifies responses in worker processes, which are killed when they take too long.

A verifier runs code of libraries over text of a model: it may loop, crash or be killed for its
memory. None of that says anything about the answer, so such a sample is left out of the loss and
counted.
"""

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nemotron.children import module_command
from nemotron.posttrain.environments.base import Response, Row, Verdict, environment_of
from nemotron.posttrain.environments.wire import LOADED, fault, read_verdict

START_S = 180.0
"""Most seconds in which a process begins and loads an environment, beside those of a verdict."""
MAX_BATCH = 64
"""Most answers that a process is given at once."""


class Verifiers:
    """A pool of processes that judge; each loads an environment once and keeps it."""

    def __init__(
        self, workers: int, options: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        """`options` holds what `find_environment` is given, by the environment's name."""
        self.faults: Counter[str] = Counter()
        """Samples that could not be judged, by environment."""
        self._options = {name: dict(given) for name, given in (options or {}).items()}
        self._workers = workers
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verify")
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(_Worker())

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
    ) -> list[Verdict]:
        """Return the verdict of each response; one that took longer than `timeout_s` is a fault."""
        triples = zip(rows, responses, states, strict=True)
        jobs = [self._job(*triple, timeout_s) for triple in triples]
        # several times as many as processes, so that none waits long for the last one
        size = min(MAX_BATCH, -(-len(jobs) // (4 * self._workers)))
        waiting = [
            self._threads.submit(self._judge, jobs[first : first + size], timeout_s)
            for first in range(0, len(jobs), max(size, 1))
        ]
        verdicts = [verdict for each in waiting for verdict in each.result()]
        for row, verdict in zip(rows, verdicts, strict=True):
            self.faults[environment_of(row)] += verdict.error is not None
        return verdicts

    def close(self) -> None:
        """End all processes."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().close()

    def _job(self, row: Row, response: Response, state: Any, timeout_s: float) -> dict[str, Any]:
        name = environment_of(row)
        return {
            "environment": name,
            "options": self._options.get(name, {}),
            "row": row,
            "response": response,
            "state": state,
            "timeout_s": timeout_s,
        }

    def _judge(self, jobs: Sequence[dict[str, Any]], timeout_s: float) -> list[Verdict]:
        worker = self._idle.get()
        verdicts: list[Verdict] = []
        try:
            while len(verdicts) < len(jobs):  # a fault ends the process, and others go on
                verdicts += worker.judge(jobs[len(verdicts) :], timeout_s)
        finally:
            self._idle.put(worker)
        return verdicts


class _Worker:
    """One process, started when it is first needed and again after its end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._loaded: set[str] = set()
        """Environments that the process has loaded."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker

    def judge(self, jobs: Sequence[dict[str, Any]], timeout_s: float) -> list[Verdict]:
        """Return the verdicts of the first jobs: of all, or up to the first fault."""
        process = self._start()
        verdicts: list[Verdict] = []

        def limit_s() -> float:
            is_loaded = jobs[len(verdicts)]["environment"] in self._loaded
            return timeout_s + (0.0 if is_loaded else START_S)

        with _Deadline(process, limit_s()) as deadline:
            for answer in _ask(process, json.dumps(jobs, default=vars)):
                if (found := json.loads(answer)) == LOADED:
                    self._loaded.add(jobs[len(verdicts)]["environment"])
                else:
                    verdicts.append(read_verdict(found))
                if len(verdicts) == len(jobs):
                    break
                deadline.renew(limit_s())
        has_all = len(verdicts) == len(jobs)
        if deadline.has_passed or not has_all:
            self.kill()
        if has_all:
            return verdicts
        late = f"took longer than {deadline.seconds:g} s"
        reason = late if deadline.has_passed else f"ended: {self._last_line(process)}"
        return [*verdicts, fault(f"the verifier {reason}")]

    def close(self) -> None:
        """End the process for good."""
        self.kill()
        self._said.close()

    def kill(self) -> None:
        """End the process and those that it started."""
        if self._process is not None:
            _kill(self._process)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                _close(pipe)
            self._process = None

    def _start(self) -> "subprocess.Popen[str]":
        if self._process is None or self._process.poll() is not None:
            self.kill()
            self._loaded.clear()
            self._said.seek(0)
            self._said.truncate()
            self._process = subprocess.Popen(
                module_command("nemotron.posttrain.verify_worker"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
        return self._process

    def _last_line(self, process: "subprocess.Popen[str]") -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else f"with status {process.returncode}"


class _Deadline:
    """Ends a process that says nothing for so long."""

    def __init__(self, process: "subprocess.Popen[str]", timeout_s: float) -> None:
        self._process, self.seconds = process, timeout_s
        self._at = time.monotonic() + timeout_s
        self._changed = threading.Condition()
        self._is_over = self.has_passed = False

    def __enter__(self) -> "_Deadline":
        self._thread = threading.Thread(target=self._watch, name="deadline")
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify()
        self._thread.join()

    def renew(self, timeout_s: float) -> None:
        """Begin anew, because the process has answered."""
        with self._changed:
            self.seconds, self._at = timeout_s, time.monotonic() + timeout_s
            self._changed.notify()

    def _watch(self) -> None:
        with self._changed:
            while not self._is_over and (left := self._at - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._is_over:
                return
            self.has_passed = True
        _kill(self._process)


def _ask(process: "subprocess.Popen[str]", jobs: str) -> Iterator[str]:
    """Yield the lines that answer some jobs, fewer than jobs if the process ends before."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(jobs + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return
    while (answer := process.stdout.readline()).endswith("\n"):
        yield answer


def _kill(process: "subprocess.Popen[str]") -> None:
    # its own group: what it started, such as a sandbox, ends with it
    if process.returncode is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def _close(pipe: Any) -> None:
    try:
        pipe.close()
    except BrokenPipeError:  # what was not written yet is lost with the process
        return
