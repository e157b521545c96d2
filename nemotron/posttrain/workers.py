"""Processes that run environments, and are killed when one takes too long."""

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron.children import module_command
from nemotron.posttrain.environments.wire import LOADED

START_S = 180.0
"""Most seconds in which a process begins and loads an environment, beside those of an answer."""


@dataclass(frozen=True)
class WorkerFault:
    """What stands for the answer to a job that got none."""

    problem: str
    """Completes a sentence about what was asked."""


class Worker:
    """One process, started when it is first needed and again after its end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._loaded: set[str] = set()
        """Environments that the process has loaded."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker

    def ask(self, jobs: Sequence[dict[str, Any]], timeout_s: float) -> list[Any]:
        """Return what the process answers to the first jobs, in JSON's types.

        That is to all of them, or up to the first without an answer, for which there is a
        `WorkerFault`; the process then has ended.
        """
        process = self._start()
        given = [{**job, "timeout_s": timeout_s} for job in jobs]
        answers: list[Any] = []

        def limit_s() -> float:
            is_loaded = jobs[len(answers)]["environment"] in self._loaded
            return timeout_s + (0.0 if is_loaded else START_S)

        with _Deadline(process, limit_s()) as deadline:
            for line in _ask(process, json.dumps(given, default=vars)):
                if (answer := json.loads(line)) == LOADED:
                    self._loaded.add(jobs[len(answers)]["environment"])
                else:
                    answers.append(answer)
                if len(answers) == len(jobs):
                    break
                deadline.renew(limit_s())
        has_all = len(answers) == len(jobs)
        if deadline.has_passed or not has_all:
            self.kill()
        if has_all:
            return answers
        late = f"took longer than {deadline.seconds:g} s"
        reason = late if deadline.has_passed else f"ended: {self._last_line(process)}"
        return [*answers, WorkerFault(reason)]

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
