"""Processes that run environments, and are killed when one takes too long."""

import json
import os
import signal
import subprocess
import tempfile
import threading
from typing import Any

from nemotron.children import module_command


class WorkerFault(Exception):
    """A job without an answer; completes a sentence about what was asked."""


class Worker:
    """One process, started when it is first needed and again after its end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker

    def ask(self, job: dict[str, Any], timeout_s: float) -> Any:  # Any: JSON
        """Return what the process answers to a job.

        Raises:
            WorkerFault: when it ends before, or takes longer than `timeout_s`.
        """
        process = self._start()
        late = threading.Event()
        timer = threading.Timer(timeout_s, self._stop, (process, late))
        timer.start()
        answer = _ask(process, json.dumps({**job, "timeout_s": timeout_s}, default=vars))
        timer.cancel()
        timer.join()
        if answer.endswith("\n"):
            return json.loads(answer)
        self.kill()
        if late.is_set():
            raise WorkerFault(f"took longer than {timeout_s:g} s")
        raise WorkerFault(f"ended: {self._last_line(process)}")

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
