"""Runs a program that a model wrote, with several inputs, in one sandbox."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron.errors import UserError
from nemotron.posttrain.sandbox.bwrap import Isolation, command, find_isolation
from nemotron.posttrain.sandbox.config import SandboxConfig
from nemotron.posttrain.sandbox.seccomp import find_binding, write_filter

LAUNCHER = Path(__file__).with_name("launcher.py")
SPARE_S = 2.0
"""Time beyond `total_s` after which a sandbox is killed from outside."""
MOST_LINES = 1000
PERMIT = "NEMOTRON_ALLOW_UNSAFE_CODE"
"""Variable of the environment, which is trusted as recipes are not."""


def permits_code() -> bool:
    """Say whether the environment allows code of others to run without isolation."""
    return os.environ.get(PERMIT) == "1"


class SandboxFailed(RuntimeError):
    """The sandbox itself did not start; says nothing about the program."""


@dataclass(frozen=True)
class Run:
    """One start of the program: with a standard input, or as a call of a function."""

    stdin: str = ""
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What one run wrote, and how it ended."""

    stdout: str
    stderr: str
    status: int | None
    """As of `subprocess`; absent when the run was ended."""
    reason: str
    """end: by itself; time, output: it was over the limit."""


class Sandbox:
    """Runs programs, each in a new sandbox.

    Raises:
        UserError: when this machine cannot isolate and the section does not allow less.
    """

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self.config = config or SandboxConfig()
        self._isolation: Isolation | None = None
        if self.config.kind == "bwrap":
            found = find_isolation()
            if isinstance(found, str):
                rule = f"does not work here: {found}."
                raise UserError(rule, key="kind", value="bwrap", where="sandbox")
            self._isolation = found
        elif not permits_code():
            rule = (
                "runs code of a model without isolation, which a recipe cannot allow; set "
                f"{PERMIT}=1 in the environment of a machine that may be damaged, or use bwrap."
            )
            raise UserError(rule, key="kind", value="none", where="sandbox")
        self._binding = find_binding()

    def describe(self) -> str:
        """Return one line that says what isolates."""
        if self._isolation is None:
            return "no isolation: code of the model runs as this user"
        filtered = "with" if self._binding else "without"
        user = "this user" if self._isolation.user is None else f"user {self._isolation.user}"
        return f"bubblewrap, {user}, {filtered} a filter of system calls"

    def run(
        self, code: str, runs: Sequence[Run], function: str | None = None
    ) -> list[Outcome | None]:
        """Return the outcome of each run of a program; None for one that did not take place.

        With `function`, each run imports the program, calls this function of it, or of its class
        `Solution`, and has the result as JSON in `stdout`.

        Raises:
            SandboxFailed: when the sandbox did not start.
        """
        job = {
            **self.config.model_dump(),
            "is_isolated": self._isolation is not None,
            "code": code,
            "function": function,
            "runs": [{"stdin": run.stdin, "arguments": run.arguments} for run in runs],
        }
        output, errors = self._start(json.dumps(job))
        lines = output.split("\n")[:MOST_LINES]
        if not lines or _read(lines[0]) != {"is_ready": True}:
            raise SandboxFailed(f"the sandbox did not start: {errors.strip()[-500:]}")
        # a program may end the launcher or write in its place; such lines are not outcomes
        outcomes = [_outcome(_read(line)) for line in lines[1 : len(runs) + 1]]
        return outcomes + [None] * (len(runs) - len(outcomes))

    def _start(self, job: str) -> tuple[str, str]:
        """Return what the launcher wrote until its end, or until it was killed."""
        source = LAUNCHER.read_text(encoding="utf-8")
        if self._isolation is None:
            with tempfile.TemporaryDirectory() as folder:
                words = [sys.executable, "-I", "-S", "-c", source]
                return self._talk(words, job, {"cwd": folder, "env": {}})
        user = self._isolation.user
        # the first process of the namespace shows the environment that bubblewrap is given
        options: dict[str, Any] = {"cwd": "/", "env": {}}
        if user is not None:
            options |= {"user": user, "group": user, "extra_groups": []}
        inner = [self._isolation.python, "-I", "-S", "-c", source]
        if self._binding is None:
            return self._talk([*command(self._isolation, self.config, None), *inner], job, options)
        with write_filter(self._binding) as rules:
            words = command(self._isolation, self.config, rules.fileno())
            return self._talk([*words, *inner], job, {**options, "pass_fds": [rules.fileno()]})

    def _talk(self, words: list[str], job: str, options: dict[str, Any]) -> tuple[str, str]:
        pipe = subprocess.PIPE
        process: subprocess.Popen[bytes] = subprocess.Popen(
            words, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, **options
        )
        try:
            found = process.communicate(job.encode(), timeout=self.config.total_s + SPARE_S)
        except subprocess.TimeoutExpired:
            _kill(process)
            found = process.communicate()
        finally:
            _kill(process)
        return found[0].decode(errors="replace"), found[1].decode(errors="replace")


def _kill(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # with bubblewrap ends all of its namespace
        process.wait()


def _read(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _outcome(found: Any) -> Outcome | None:
    try:
        outcome = Outcome(**found)
    except TypeError:
        return None
    is_text = isinstance(outcome.stdout, str) and isinstance(outcome.stderr, str)
    return outcome if is_text and isinstance(outcome.reason, str) else None
