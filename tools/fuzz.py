"""Damage every kind of input at random, and check that each command answers as it promises.

An exit code other than 0, 1, 2 and 75, a traceback, more than 20 s or more than 2 GiB is a failure.

    python tools/fuzz.py                     300 mutations of every target
    python tools/fuzz.py 5000 'chat rows'    more of one
    python tools/fuzz.py --seed 7 --only 123 'chat rows'      one mutation again, with its output
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from select import select
from typing import NoReturn

from fuzz_target import Target
from fuzz_targets import TARGETS
from fuzz_world import build_world

ALLOWED = (0, 1, 2, 75)
LIMIT_S = 20.0
LIMIT_KIB = 2 << 20
POLL_S = 0.05


@dataclass
class Report:
    """What came of the mutations of one target."""

    tried: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    tracebacks: list[str] = field(default_factory=list)
    """Also other exit codes than promised, and ends by a signal."""
    hangs: list[str] = field(default_factory=list)
    bombs: list[str] = field(default_factory=list)
    newest: str = ""

    @property
    def failures(self) -> list[str]:
        return self.tracebacks + self.hangs + self.bombs


class Fuzzer:
    """Damages copies of a world; a forked child calls the commands until it fails."""

    def __init__(self, folder: Path, seed: int, limit_s: float) -> None:
        self.folder, self.seed, self.limit_s = folder, seed, limit_s
        self.valid = folder / "valid"
        self.valid.mkdir()
        if _wait(_fork(self._build, self.folder / "built.txt")):
            raise RuntimeError((self.folder / "built.txt").read_text())

    def run(self, name: str, numbers: Sequence[int]) -> Report:
        """Try these mutations of a target, each of which is known by its number."""
        report, left = Report(), list(numbers)
        while left:
            known = len(report.failures)
            left = left[self._run_child(name, left, report) :]
            if len(report.failures) > known:
                print(report.newest, end="\n\n", flush=True)
        return report

    def _build(self) -> int:
        os.chdir(self.valid)
        build_world(self.valid)
        return 0

    def _run_child(self, name: str, numbers: list[int], report: Report) -> int:
        """Let one child try them until it fails or has done all; returns how many it did."""
        reader, writer = os.pipe()
        said = self.folder / f"{name}.txt"
        child = _fork(lambda: self._try_all(name, numbers, writer), said)
        os.close(writer)
        done, problem = 0, None
        with os.fdopen(reader) as results:
            while done < len(numbers) and problem is None:
                problem = _watch(child, results.fileno(), self.limit_s)
                if problem is None and (line := results.readline()):
                    report.codes[int(line)] += 1
                    done += 1
                elif problem is None:
                    problem = "ended"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        status = _wait(child)
        report.tried += done
        if problem is None:
            return done
        which = f"{name} {numbers[done]}: "
        report.tried += 1
        text = said.read_text(errors="replace").strip()
        kinds = {
            "hangs": (report.hangs, f"no end after {self.limit_s:.0f} s"),
            "bomb": (report.bombs, f"more than {LIMIT_KIB >> 20} GiB"),
            "ended": (report.tracebacks, f"exit {status}"),
        }
        failures, what = kinds[problem]
        report.newest = f"{which}{what}: {text[-3000:]}"
        failures.append(report.newest)
        return done + 1

    def _try_all(self, name: str, numbers: list[int], results: int) -> int:
        # a process group of its own, so that what it starts ends with it
        for number in numbers:
            os.ftruncate(1, 0)
            code = self._try(TARGETS[name], f"{self.seed} {name} {number}")
            if code not in ALLOWED or b"Traceback (most" in Path("/proc/self/fd/1").read_bytes():
                return code or 1
            os.write(results, f"{code}\n".encode())
        time.sleep(self.limit_s)  # until the parent has read the last line
        return 0

    def _try(self, target: Target, seed: str) -> int:
        draw = random.Random(seed)
        with self._damaged(target, draw):
            words = draw.choice(target.commands)
            print("nemotron", *words, flush=True)
            return target.reader(words)

    @contextlib.contextmanager
    def _damaged(self, target: Target, draw: random.Random) -> Iterator[None]:
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
            world = Path(folder)
            file = sorted(self.valid.glob(target.file))[0].relative_to(self.valid)
            for part in {*target.uses, str(file)}:
                source, copy = self.valid / part, world / part
                copy.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, copy, dirs_exist_ok=True)
                elif source.exists():
                    shutil.copy(source, copy)
            path = world / file
            path.write_bytes(target.mutation(path.read_bytes(), draw))
            target.seal(world, draw)
            os.chdir(world)
            tempfile.tempdir = str(world)
            try:
                yield
            finally:
                tempfile.tempdir = None
                os.chdir(self.folder)


def _watch(child: int, results: int, limit_s: float) -> str | None:
    """Wait until the child says something; returns what is wrong with it instead."""
    deadline = time.monotonic() + limit_s
    while not select([results], [], [], POLL_S)[0]:
        if time.monotonic() > deadline:
            return "hangs"
        if _resident_kib(child) > LIMIT_KIB:
            return "bomb"
    return None


def _resident_kib(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") >> 10


def _fork(function: Callable[[], int], output: Path) -> int:
    """Call the function in a child whose output goes to a file; its result is the exit code."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    _become_child(function, output)


def _become_child(function: Callable[[], int], output: Path) -> NoReturn:
    code = 101
    try:
        os.setpgid(0, 0)
        target = os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (open until the end)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        code = function()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 101)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def table(reports: dict[str, Report]) -> str:
    lines = ["| target | mutations | tracebacks | hangs | over 2 GiB | exit codes |"]
    lines.append("|---|---|---|---|---|---|")
    for name, report in reports.items():
        codes = ", ".join(f"{code}: {times}" for code, times in sorted(report.codes.items()))
        faults = (len(report.tracebacks), len(report.hangs), len(report.bombs))
        lines.append(f"| {name} | {report.tried} | {' | '.join(map(str, faults))} | {codes} |")
    return "\n".join(lines)


def fuzz(
    names: Sequence[str], numbers: Sequence[int], seed: int, limit_s: float = LIMIT_S
) -> dict[str, Report]:
    """Try these mutations of each target, in a folder that is removed afterwards."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import tests.support.frozen  # noqa: F401 (once, before the children are forked)

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        fuzzer = Fuzzer(Path(folder), seed, limit_s)
        return {name: fuzzer.run(name, numbers) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="[NUMBER] TARGET", help="300 of all if absent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one mutation")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, help="seconds of a command, on a busy machine"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes, too")
    options = parser.parse_args()
    count, targets = 300, options.words
    if targets and targets[0].isdecimal():
        count, targets = int(targets[0]), targets[1:]
    numbers = range(count) if options.only is None else [options.only]
    reports = fuzz(targets or list(TARGETS), numbers, options.seed, options.limit)
    print(table(reports))
    return any(report.failures for report in reports.values())


if __name__ == "__main__":
    sys.exit(main())
