"""Processes that begin with torch and the trainer imported: forked in 0.1 s, not started in 5.

A server that has imported everything, but started no thread, is forked for each of them. They
share no state with the tests, as if each had been started by itself.
"""

import contextlib
import ctypes
import multiprocessing
import os
import runpy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

CLONE_NEWNET = 0x40000000
"""Of setns(2)."""

IMPORTED = (
    "nemotron.train.start",
    "nemotron.cli",
    "nemotron.parallel.distributed",
    "tests.support.frozen",
)
"""What the server imports once."""


class Forked:
    """A function in a process of its own, which writes into a file."""

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        output: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Call the function, which must stand in a module; what it returns is the exit code."""
        self.output = output
        output.touch()
        given = dict(os.environ if environment is None else environment)
        self.process = start(_call, output, given, function, arguments)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def text(self) -> str:
        """What it wrote so far."""
        return self.output.read_text()

    def poll(self) -> int | None:
        """Return the exit code, minus a signal's number if that ended it; None while it runs."""
        return self.process.exitcode

    def wait(self, seconds: float = 120.0) -> int:
        """Return the exit code; it must end within so many seconds."""
        self.process.join(max(0.0, seconds))
        code = self.poll()
        assert code is not None, f"it still runs after {seconds:.0f} s: {self.text}"
        return code

    def wait_for_text(self, text: str, seconds: float = 60.0) -> None:
        """Wait until it has written this."""
        deadline = time.monotonic() + seconds
        while text not in self.text:
            assert self.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.002)

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """Kill it, if it still runs."""
        if self.poll() is None:
            self.process.kill()
        self.process.join()


def command(
    *arguments: object,
    output: Path,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    namespace: str | None = None,
) -> Forked:
    """Run `python -m nemotron` with these arguments, in a folder and a network namespace."""
    words = [*map(str, arguments)]
    return Forked(run_module, words, folder, namespace, output=output, environment=environment)


def script(text: str, *arguments: object, output: Path) -> Forked:
    """Run `python -c` with a program and these arguments."""
    return Forked(_run_script, text, [*map(str, arguments)], output=output)


def _run_script(text: str, arguments: list[str]) -> None:
    sys.argv = ["-c", *arguments]
    exec(compile(text, "<string>", "exec"), {"__name__": "__main__"})


def start(function: Callable[..., Any], *arguments: Any, daemon: bool = False) -> BaseProcess:
    """Start a process that is forked from the server."""
    process = server().Process(target=function, args=arguments, daemon=daemon)
    process.start()
    return process


def server() -> ForkServerContext:
    """Return the context whose processes are forked from the server, which runs from now on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED])
    with _environment(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"):
        # threads would not survive the fork; the server keeps this environment
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(**values: str) -> Any:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _call(
    output: Path, environment: dict[str, str], function: Callable[..., Any], arguments: tuple
) -> None:
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(function(*arguments))


def run_module(
    arguments: list[str], folder: Path | None = None, namespace: str | None = None
) -> None:
    """Become `python -m nemotron` with these arguments, in a folder and a network namespace."""
    if namespace is not None:
        with open(f"/run/netns/{namespace}") as file:
            assert ctypes.CDLL(None).setns(file.fileno(), CLONE_NEWNET) == 0, namespace
    if folder is not None:
        os.chdir(folder)
    sys.argv = ["nemotron", *arguments]
    runpy.run_module("nemotron", run_name="__main__", alter_sys=True)


def run_tool(name: str, arguments: Sequence[str]) -> None:
    """Become a program of the folder `tools` with these arguments."""
    path = ROOT / "tools" / name
    sys.path.insert(0, str(path.parent))
    sys.argv = [name, *arguments]
    runpy.run_path(str(path), run_name="__main__")
