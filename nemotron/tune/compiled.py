"""Compile a launch for a GPU that is not here, in processes that know of no device.

Worker: `python -m nemotron.tune.compiled` reads jobs from its standard input, a line of JSON each,
and answers each with a line. What it compiles lies in Triton's cache, where a launch on the device
finds it.
"""

import dataclasses
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from nemotron.children import module_command
from nemotron.ops import launch
from nemotron.ops.tuning import base
from nemotron.ops.tuning.tunable import Configuration
from nemotron.sol.sizes import Rows, Size
from nemotron.tune.problems import Draw, Target, targets

SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a block of compute capability 9.0 can have."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a candidate's launches: the largest numbers of all of them."""

    registers: int = 0
    stack: int = 0
    """Bytes of spilled registers."""
    shared: int = 0
    launches: tuple[str, ...] = ()
    """What makes them differ from others: the kernel's hash and the grid."""
    fault: str = ""
    """Why it could not be compiled; empty when it could."""
    is_absent: bool = False
    """Whether the problem does not launch it at these sizes, with any configuration."""

    def unfit(self) -> str:
        """Say why this candidate is not worth a launch; empty when it is."""
        if self.fault:
            return self.fault
        if self.shared > SHARED_LIMIT:
            return f"asks for {self.shared // 1024} KiB of shared memory"
        return f"spills {self.stack} bytes" if self.stack else ""


def pretend(arch: int) -> None:
    """Let Triton compile for this compute capability, with no driver."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )


@contextmanager
def launches_replaced(run: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Let `run(kernel, *arguments, grid=, warmup=, ...)` stand for each launch; yields Triton's."""
    kind = InterpretedFunction if launch.INTERPRETED else JITFunction
    kept, own = kind.run, launch.Launcher.__call__

    def plainly(
        self: Any, grid: Any, tensors: Any, numbers: Any, constants: Any, **options: Any
    ) -> None:
        self.kernel[grid](*tensors, *numbers, *constants, **options)

    kind.run = run
    launch.Launcher.__call__ = plainly  # type: ignore[method-assign]  # it remembers launches
    try:
        yield kept
    finally:
        kind.run = kept
        launch.Launcher.__call__ = own  # type: ignore[method-assign]


def used(kernel: Any) -> tuple[int, int, int]:
    """Return registers, bytes of stack and of shared memory of a compiled kernel.

    The first two are 0 where Triton came without cuobjdump; then only times show what spills.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return 0, 0, kernel.metadata.shared
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, f"cuobjdump says nothing of {kernel.metadata.name}: {text}"
    return int(found[1]), int(found[2]), kernel.metadata.shared


def compile_one(target: Target, configuration: Configuration, architecture: str) -> Compiled:
    """Compile the launches of a candidate, and none of the operation's others."""
    kernels = target.tunable.kernels
    found: list[tuple[int, int, int]] = []
    names: list[str] = []

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        if self not in kernels:
            return None
        kernel = run(self, *arguments, grid=grid, warmup=True, **keywords)
        found.append(used(kernel))
        names.append(f"{kernel.hash} {tuple(grid)}")
        return kernel

    with (
        launches_replaced(compile_only) as run,
        base.assume(architecture),
        target.tunable.forced(configuration) as asked,
    ):
        target.problem.draw(target.sizes, Draw(torch.device("meta"), 0))()
    if not asked or not found:
        return Compiled(fault="is not launched at these sizes", is_absent=True)
    registers, stack, shared = (max(numbers) for numbers in zip(*found, strict=True))
    return Compiled(registers, stack, shared, tuple(names))


Job = tuple[Target, Configuration]


class Pool:
    """Processes that compile; used as a context, which ends them."""

    def __init__(self, architecture: str, processes: int) -> None:
        self.architecture, self.processes = architecture, processes
        self._running: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            _end(process)

    def compile(self, jobs: Iterable[Job], until: float) -> dict[int, Compiled]:
        """Return by a job's number what was compiled before that time (`time.monotonic`)."""
        waiting: queue.SimpleQueue[tuple[int, Job]] = queue.SimpleQueue()
        count = 0
        for count, job in enumerate(jobs, 1):
            waiting.put((count - 1, job))
        found: dict[int, Compiled] = {}
        while len(self._running) < min(self.processes, count):
            self._running.append(self._start())
        threads = [
            threading.Thread(target=self._serve, args=(place, waiting, found, until), daemon=True)
            for place in range(len(self._running))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        late = [place for place, thread in enumerate(threads) if thread.is_alive()]
        for place in late:
            self._running[place].kill()  # its thread reads the end of its answers
        for place in late:
            threads[place].join()
            _end(self._running[place])
        self._running = [p for place, p in enumerate(self._running) if place not in late]
        return found

    def _serve(
        self,
        place: int,
        waiting: "queue.SimpleQueue[tuple[int, Job]]",
        found: dict[int, Compiled],
        until: float,
    ) -> None:
        while time.monotonic() < until:
            try:
                number, job = waiting.get_nowait()
            except queue.Empty:
                return
            process = self._running[place]
            try:
                answer = _ask(process, job)
            except (OSError, ValueError):
                if time.monotonic() >= until:
                    return
                found[number] = Compiled(fault="ends the compiler")
                _end(process)
                self._running[place] = self._start()
                continue
            found[number] = answer

    def _start(self) -> "subprocess.Popen[str]":
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        return subprocess.Popen(
            [*module_command("nemotron.tune.compiled"), self.architecture],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    with process:  # closes its pipes and waits
        pass


def _ask(process: "subprocess.Popen[str]", job: Job) -> Compiled:
    target, configuration = job
    line = {
        "sizes": dataclasses.asdict(target.sizes),
        "problem": target.problem.name,
        "launch": target.tunable.name,
        "configuration": dict(configuration),
    }
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(line) + "\n")
    process.stdin.flush()
    answer = json.loads(process.stdout.readline())
    return Compiled(**{**answer, "launches": tuple(answer["launches"])})


def main() -> None:
    """Answer jobs until there are no more."""
    architecture = sys.argv[1]
    pretend(int(architecture.removeprefix("sm")))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is not an answer
    for line in sys.stdin:
        job = json.loads(line)
        rows = {name: Rows(**job["sizes"][name]) for name in ("usual", "checked")}
        found_targets = targets(job["launch"], [Size(**job["sizes"] | rows)])
        target = next(t for t in found_targets if t.problem.name == job["problem"])
        try:
            found = compile_one(target, job["configuration"], architecture)
        except Exception as problem:  # the compiler's: of any kind, and the next job is another
            found = Compiled(
                fault=f"{type(problem).__name__}: {' '.join(str(problem).split())[:150]}"
            )
        print(json.dumps(dataclasses.asdict(found)), file=answers, flush=True)


if __name__ == "__main__":
    main()
