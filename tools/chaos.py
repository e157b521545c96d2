"""Disturb a run on two ranks again and again, and see whether a bit is lost or a status is wrong.

Each round starts or resumes the run and does one thing to it at a random moment: a rank is killed,
frozen, or asked to stop, the disk is full for a while, a file or the whole folder of the run goes
away. Every rank must end in bounded time with a sentence, and the status must be true. At the end
the run must agree with one that nothing disturbed, in every tensor and every logged number.

    python tools/chaos.py --rounds 50 --seed 1
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from nemotron.train.config import PretrainConfig  # noqa: E402
from tests.support.forked import Forked  # noqa: E402
from tests.support.job import Job, busy  # noqa: E402
from tests.support.prepared import write_prepared  # noqa: E402
from tests.support.same_run import assert_same_run  # noqa: E402
from tests.support.small_disk import Filler  # noqa: E402
from tests.support.tiny_run import build_recipe  # noqa: E402

BOUND_S = 30.0 + 30.0 * busy()
"""Seconds in which all ranks must have ended after they were disturbed; most of them are load."""
TIMEOUT_S = 4.0 * busy()
"""Of the run: seconds that a step may wait for another rank."""
REMOVED = ("metrics.jsonl", "status.json", "provenance.json", "lock", "log.txt", "recipe.yaml")


class Lost(Exception):
    """What must not happen, in one sentence."""


@dataclass
class Round:
    """A start of the run, and what disturbs it."""

    job: Job
    draw: random.Random
    disk: Path

    def kill(self) -> None:
        """Let a rank die without a word."""
        self._any().send_signal(signal.SIGKILL)

    def freeze(self) -> None:
        """Let a rank stand still until the other has ended, and then go on."""
        number = self.draw.randrange(2)
        frozen, other = self.job.processes[number], self.job.processes[1 - number]
        frozen.send_signal(signal.SIGSTOP)
        try:
            _wait_until(lambda: other.poll() is not None, "the other rank notices a frozen one")
        finally:
            frozen.send_signal(signal.SIGCONT)

    def pause(self) -> None:
        """Let a rank stand still for less than the others wait."""
        paused = self._any()
        paused.send_signal(signal.SIGSTOP)
        time.sleep(TIMEOUT_S / 4)
        paused.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Ask a rank to stop."""
        self._any().send_signal(self.draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]))

    def fill(self) -> None:
        """Take all the room for a while."""
        filler = Filler(self.disk)
        time.sleep(self.draw.uniform(0.2, 1.5))
        filler.remove()

    def remove_file(self) -> None:
        """Remove a file of the run while it is written to; the next starts miss it."""
        name = self.draw.choice(REMOVED[1:])
        (self.job.run / name).unlink(missing_ok=True)

    def remove_checkpoint(self) -> None:
        """Damage the newest checkpoint, and let a rank die."""
        for path in sorted(self.job.run.glob("checkpoints/step-*/rank-*"))[-1:]:
            path.unlink(missing_ok=True)
        self.kill()

    def rename_folder(self) -> None:
        """Rename the folder of the run until all ranks have ended."""
        run, aside = self.job.run, self.job.run.with_name("aside")
        with contextlib.suppress(FileNotFoundError):
            run.rename(aside)
            try:
                _wait_until(self.has_ended, "the ranks notice that their folder is gone")
            finally:
                if run.exists():
                    raise Lost(f"{run} was made anew: {sorted(os.listdir(run))}")
                aside.rename(run)

    def has_ended(self) -> bool:
        """Say whether no rank runs any more."""
        return all(process.poll() is not None for process in self.job.processes)

    def _any(self) -> Forked:
        return self.draw.choice(self.job.processes)


DISTURBANCES: tuple[Callable[[Round], None], ...] = (
    Round.kill,
    Round.freeze,
    Round.pause,
    Round.stop,
    Round.fill,
    Round.remove_file,
    Round.remove_checkpoint,
    Round.rename_folder,
)


def main() -> int:
    """Run the rounds; returns 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--steps", type=int, default=0, help="of the run; default: 8 for a round")
    parser.add_argument("--seed", type=int, default=0, help="of what happens, and when")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, disk_at(Path(folder)) as disk:
        return chaos(options, disk)


@contextlib.contextmanager
def disk_at(folder: Path) -> Iterator[Path]:
    """Return a small disk to fill, or, where none can be mounted, a folder: then none is full."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    if not mounted:
        print("no small disk can be mounted here (needs root): it is never full")
    try:
        yield disk if mounted else folder
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", disk], check=True)


def chaos(options: argparse.Namespace, disk: Path) -> int:
    """Train undisturbed and disturbed, print a line for each round, compare."""
    draw = random.Random(options.seed)
    steps = options.steps or 8 * options.rounds
    shards = {
        name: str(write_prepared(texts(name), disk / name, validation_fraction=0.1))
        for name in ("prose", "numbers")
    }
    started = lambda name: Job(recipe(disk, shards, name, steps), "--resume")  # noqa: E731
    whole = started("whole")
    if whole.wait(60 + 2.0 * steps) != [0, 0]:
        print(f"the undisturbed run failed: {whole.text()}")
        return 1
    kinds = [kind for kind in DISTURBANCES if disk.name == "disk" or kind is not Round.fill]
    left: list[Callable[[Round], None]] = []
    for number in range(1, options.rounds + 1):
        if not left:  # each kind before one comes again
            left = draw.sample(kinds, len(kinds))
        try:
            line = disturb(started("run"), left.pop(), draw, disk)
        except (Lost, AssertionError) as problem:
            print(f"round {number}: {problem}")
            return 1
        print(f"{number:>3}  {line}", flush=True)
    last = started("run")
    if last.wait(60 + 2.0 * steps) != [0, 0]:
        print(f"the last start failed: {last.text()}")
        return 1
    assert_same_run(last.run, whole.run)
    print(f"{options.rounds} rounds; every tensor and logged number is equal")
    return 0


def recipe(disk: Path, shards: dict[str, str], name: str, steps: int) -> PretrainConfig:
    """Return the recipe of one of the two runs."""
    return build_recipe(
        disk,
        shards,
        name,
        batch={"global_tokens": 31 * 4, "micro_batch": 2},
        schedule={"kind": "constant", "peak": 1e-3, "total_steps": steps},
        evaluation={"every_steps": 7, "tokens": 62},
        checkpoint={"every_steps": 3, "keep": 2},
        parallel={"timeout_s": TIMEOUT_S, "start_timeout_s": 30.0},
    )


def disturb(job: Job, kind: Callable[[Round], None], draw: random.Random, disk: Path) -> str:
    """Do one thing to a start of the run at a random moment; returns a line about it.

    Raises:
        Lost: when a rank does not end, or says nothing, or the status is wrong.
    """
    before = last_step(job.run)
    steps_on = draw.randrange(1, 5)
    reached = lambda: last_step(job.run) >= before + steps_on  # noqa: E731
    now = Round(job, draw, disk)
    try:
        _wait_until(lambda: now.has_ended() or reached(), "the run goes on")
        time.sleep(draw.uniform(0, 0.1))
        kind(now)
        if kind in (Round.pause, Round.fill, Round.remove_file):
            # what a run survives must not end it
            step = last_step(job.run)
            _wait_until(lambda: now.has_ended() or last_step(job.run) > step, "the run survives")
            if now.has_ended() and codes(job) != [0, 0]:
                raise Lost(f"{kind.__name__} ended the run: {job.text()[-3000:]}")
            job.processes[0].send_signal(signal.SIGTERM)
        _wait_until(now.has_ended, f"all ranks end after {kind.__name__}")
        check_end(job, kind)
    finally:
        job.end()
    ends = ", ".join(map(str, codes(job)))
    return f"{kind.__name__:<18} after step {last_step(job.run):>4}  exit codes {ends}"


def check_end(job: Job, kind: Callable[[Round], None]) -> None:
    """Raise Lost when a rank has another exit code than promised, says nothing, or lies."""
    for number, process in enumerate(job.processes):
        code, text = process.poll(), process.text
        if code not in (0, 1, 75, -signal.SIGKILL) or "Traceback" in text:
            raise Lost(f"{kind.__name__}: rank {number} ended with {code}: {job.text()[-3000:]}")
    if 1 in codes(job) and "nemotron: " not in job.text() and "failed: " not in job.text():
        raise Lost(f"{kind.__name__}: no rank says why it ended: {job.text()[-3000:]}")
    status = job.run / "status.json"
    state = json.loads(status.read_text())["state"] if status.exists() else None
    expected = {0: "done", 1: "failed", 75: "stopped"}.get(codes(job)[0] or 0)
    if codes(job)[0] == -signal.SIGKILL:
        return  # only the other ranks can say that this one is dead, and they may have left
    if state is not None and state != expected:
        raise Lost(
            f"{kind.__name__}: the status is {state} after {codes(job)}: {job.text()[-3000:]}"
        )


def codes(job: Job) -> list[int | None]:
    """Return the exit codes of the ranks."""
    return [process.poll() for process in job.processes]


def last_step(run: Path) -> int:
    """Return the last step in the metrics."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return json.loads((run / "metrics.jsonl").read_bytes().splitlines()[-1])["step"]
    return 0


def texts(name: str) -> list[str]:
    """Return invented text, the same every time."""
    draw = random.Random(name)
    words = ["the", "river", "runs", "to", "sea", "and", "stone", "stays", "0", "1"]
    return [" ".join(draw.choices(words, k=draw.randint(5, 60))) for _ in range(120)]


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + BOUND_S
    while not condition():
        if time.monotonic() > deadline:
            raise Lost(f"waited {BOUND_S:.0f} s in vain until {what}")
        time.sleep(0.005)


if __name__ == "__main__":
    sys.exit(main())
