"""Damage every kind of input at random, and check that each command answers as it promises.

An exit code other than 0, 1, 2 and 75, a traceback, more than 20 s or more than 2 GiB is a failure.

    python tools/fuzz.py                     300 mutations of every target
    python tools/fuzz.py 5000 'chat rows'    more of one
    python tools/fuzz.py --direct 20 5000    one command in 20, else functions that read the file
    python tools/fuzz.py --undamaged         every command once, which must not refuse its files
    python tools/fuzz.py --seed 7 --only 123 'chat rows'      one mutation again, with its output
"""

import argparse
import contextlib
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fuzz_process import LIMIT_KIB, cpu_s, fork, largest_kib, wait, watch
from fuzz_readers import call
from fuzz_reuse import reuse
from fuzz_target import Target
from fuzz_targets import TARGETS
from fuzz_world import build_world

from nemotron.exit_codes import WRONG_INPUT

ALLOWED = (0, 1, 2, 75)
LIMIT_S = 20.0
AT_ONCE = 25
"""Mutations of a child, after which the seconds of a core are counted."""
MEMORY = "/dev/shm"
"""Where copies cost no writing to a disk."""


@dataclass(frozen=True)
class Options:
    """How mutations are tried."""

    seed: int = 0
    limit_s: float = LIMIT_S
    direct: int = 1
    """One mutation of so many runs a command; the others call the functions that read the file."""
    seconds: float = math.inf
    """Of a core, after which a target gets no more mutations."""
    undamaged: bool = False
    """Run the commands on what is right, and none of them may refuse it."""


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

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder, self.options = folder, options
        self.valid = folder / "valid"
        self.valid.mkdir()
        if wait(fork(self._build, self.folder / "built.txt")):
            raise RuntimeError((self.folder / "built.txt").read_text())
        reuse(self.valid)

    def run(self, name: str, numbers: Sequence[int]) -> Report:
        """Try these mutations of a target, each of which is known by its number."""
        report, left = Report(), list(numbers)
        begin = cpu_s()
        while left and cpu_s() - begin < self.options.seconds:
            known = len(report.failures)
            left = left[self._run_child(name, left[:AT_ONCE], report) :]
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
        child = fork(lambda: self._try_all(name, numbers, writer), said)
        os.close(writer)
        done, problem = 0, None
        # without a buffer, so that select knows of all that was not read yet
        with os.fdopen(reader, "rb", buffering=0) as results:
            while done < len(numbers) and problem is None:
                problem = watch(child, results.fileno(), self.options.limit_s)
                if problem is None and (line := results.readline()):
                    code, largest_kib = map(int, line.split())
                    if largest_kib > LIMIT_KIB:
                        problem = "bomb"
                        break
                    report.codes[code] += 1
                    done += 1
                elif problem is None:
                    problem = "ended"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        status = wait(child)
        report.tried += done
        if problem is None:
            return done
        which = f"{name} {numbers[done]}: "
        report.tried += 1
        text = said.read_text(errors="replace").strip()
        kinds = {
            "hangs": (report.hangs, f"no end after {self.options.limit_s:.0f} s"),
            "bomb": (report.bombs, f"more than {LIMIT_KIB >> 20} GiB"),
            "ended": (report.tracebacks, f"exit {status}"),
        }
        failures, what = kinds[problem]
        report.newest = f"{which}{what}: {text[-3000:]}"
        failures.append(report.newest)
        return done + 1

    def _try_all(self, name: str, numbers: list[int], results: int) -> int:
        # a process group of its own, so that what it starts ends with it
        target = TARGETS[name]
        for number in numbers:
            os.ftruncate(1, 0)
            draw = random.Random(f"{self.options.seed} {name} {number}")
            if self.options.undamaged:
                code = self._run(undamaged(target, number), draw)
                code += 1000 * (code == WRONG_INPUT)
            elif target.direct is not None and (number + len(name)) % self.options.direct:
                code = self._call(target, draw)
            else:
                code = self._run(target, draw)
            if code not in ALLOWED or b"Traceback (most" in Path("/proc/self/fd/1").read_bytes():
                return code or 1
            os.write(results, f"{code} {largest_kib()}\n".encode())
        time.sleep(self.options.limit_s)  # until the parent has read the last line
        return 0

    def _run(self, target: Target, draw: random.Random) -> int:
        """Run one of the commands in a copy of its own."""
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as folder:
            world = Path(folder)
            self._copy(target, world)
            self._damage(target, world, draw)
            words = draw.choice(target.commands)
            print("nemotron", *words, flush=True)
            with _inside(world):
                return target.reader(words)

    def _call(self, target: Target, draw: random.Random) -> int:
        """Call the function that reads the file, in a copy that stays."""
        assert target.direct is not None
        world = self.folder / "copy" / target.file.replace("/", "-")
        if not world.exists():
            self._copy(target, world)
        inside = self._place(target).parent
        for path in (self.valid / inside).iterdir():
            if path.is_file():
                shutil.copy(path, world / inside / path.name)
        self._damage(target, world, draw)
        with _inside(world):
            return call(target.direct)

    def _place(self, target: Target) -> Path:
        return sorted(self.valid.glob(target.file))[0].relative_to(self.valid)

    def _copy(self, target: Target, world: Path) -> None:
        for part in {*target.uses, str(self._place(target))}:
            source, copy = self.valid / part, world / part
            copy.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, copy, dirs_exist_ok=True)
            elif source.exists():
                shutil.copy(source, copy)

    def _damage(self, target: Target, world: Path, draw: random.Random) -> None:
        path = world / self._place(target)
        path.write_bytes(target.mutation(path.read_bytes(), draw))
        target.seal(world, draw)


@contextlib.contextmanager
def _inside(world: Path) -> Iterator[None]:
    """Make a folder the current one, and the place of temporary files."""
    before = Path.cwd()
    os.chdir(world)
    tempfile.tempdir = str(world)
    try:
        yield
    finally:
        tempfile.tempdir = None
        os.chdir(before)


def table(reports: dict[str, Report]) -> str:
    lines = ["| target | mutations | tracebacks | hangs | over 2 GiB | exit codes |"]
    lines.append("|---|---|---|---|---|---|")
    for name, report in reports.items():
        codes = ", ".join(f"{code}: {times}" for code, times in sorted(report.codes.items()))
        faults = (len(report.tracebacks), len(report.hangs), len(report.bombs))
        lines.append(f"| {name} | {report.tried} | {' | '.join(map(str, faults))} | {codes} |")
    return "\n".join(lines)


def undamaged(target: Target, number: int) -> Target:
    """Return a target whose file stays as it is, with one of its commands."""
    commands = [target.commands[number % len(target.commands)]]
    return replace(target, mutation=lambda content, draw: content, commands=commands)


def fuzz(names: Sequence[str], numbers: Sequence[int], options: Options) -> dict[str, Report]:
    """Try these mutations of each target, in a folder that is removed afterwards."""
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import tests.support.frozen  # noqa: F401 (once, before the children are forked)

    home = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=home) as folder:
        fuzzer = Fuzzer(Path(folder), options)
        if options.undamaged:
            known = [name for name in names if not TARGETS[name].is_refused]
            return {name: fuzzer.run(name, range(len(TARGETS[name].commands))) for name in known}
        return {name: fuzzer.run(name, numbers) for name in names}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="[NUMBER] TARGET", help="300 of all if absent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one mutation")
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, help="seconds of a command, on a busy machine"
    )
    parser.add_argument(
        "--direct", type=int, default=1, help="call functions, but one command in so many"
    )
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="seconds of a core for a target"
    )
    parser.add_argument("--undamaged", action="store_true", help="run commands on what is right")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of mistakes, too")
    given = parser.parse_args()
    count, targets = 300, given.words
    if targets and targets[0].isdecimal():
        count, targets = int(targets[0]), targets[1:]
    numbers = range(count) if given.only is None else [given.only]
    options = Options(given.seed, given.limit, given.direct, given.seconds, given.undamaged)
    reports = fuzz(targets or list(TARGETS), numbers, options)
    print(table(reports))
    return any(report.failures for report in reports.values())


if __name__ == "__main__":
    sys.exit(main())
