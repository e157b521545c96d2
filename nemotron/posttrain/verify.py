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
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nemotron.children import module_command
from nemotron.posttrain.environments.base import Response, Row, Verdict, environment_of
from nemotron.posttrain.environments.wire import fault, read_verdict


class Verifiers:
    """A pool of processes that judge; each loads an environment once and keeps it."""

    def __init__(
        self, workers: int, options: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        """`options` holds what `find_environment` is given, by the environment's name."""
        self.faults: Counter[str] = Counter()
        """Samples that could not be judged, by environment."""
        self._options = {name: dict(given) for name, given in (options or {}).items()}
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
        jobs = zip(rows, responses, states, strict=True)
        waiting = [self._threads.submit(self._judge, *job, timeout_s) for job in jobs]
        verdicts = [each.result() for each in waiting]
        for row, verdict in zip(rows, verdicts, strict=True):
            self.faults[environment_of(row)] += verdict.error is not None
        return verdicts

    def close(self) -> None:
        """End all processes."""
        self._threads.shutdown()
        while not self._idle.empty():
            self._idle.get().close()

    def _judge(self, row: Row, response: Response, state: Any, timeout_s: float) -> Verdict:
        name = environment_of(row)
        job = {
            "environment": name,
            "options": self._options.get(name, {}),
            "row": row,
            "response": response,
            "state": state,
            "timeout_s": timeout_s,
        }
        worker = self._idle.get()
        try:
            return worker.judge(json.dumps(job, default=vars), timeout_s)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process, started when it is first needed and again after its end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker

    def judge(self, job: str, timeout_s: float) -> Verdict:
        """Return the verdict, or a fault with its reason."""
        process = self._start()
        late = threading.Event()
        timer = threading.Timer(timeout_s, self._stop, (process, late))
        timer.start()
        answer = _ask(process, job)
        timer.cancel()
        timer.join()
        if answer.endswith("\n"):
            return read_verdict(json.loads(answer))
        self.kill()
        if late.is_set():
            return fault(f"the verifier took longer than {timeout_s:g} s")
        return fault(f"the verifier ended: {self._last_line(process)}")

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

    @staticmethod
    def _stop(process: "subprocess.Popen[str]", late: threading.Event) -> None:
        late.set()
        _kill(process)

    def _last_line(self, process: "subprocess.Popen[str]") -> str:
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else f"with status {process.returncode}"


def _ask(process: "subprocess.Popen[str]", job: str) -> str:
    """Return the line that answers a job, less than a line if the process ends before."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(job + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return ""


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
