"""Everything that needs a GPU: check.py --out FOLDER [--stages a,b] [--seconds S] [--tiny].

Each stage is a process with a time limit, so a failing one stops no other. Every result is one line
in FOLDER/results.jsonl, written at once; logs and tables lie beside it. A short table and one line
of JSON are printed last. Stages that only compile or check run beside each other; none runs beside
one that takes times. `--tiny` runs the same code on a CPU, at sizes that only show bugs.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from table import RESULTS, summary, table

HERE = Path(__file__).parent
USUAL = 420.0
"""Seconds of the whole program by default; other values scale each stage's limit."""


@dataclass(frozen=True)
class Task:
    """A process of a stage: `seconds` is its limit, `together` names what may run beside it."""

    stage: str
    module: str
    seconds: float
    words: tuple[str, ...] = ()
    together: str = ""
    packages: bool = False
    """Whether the sources of mamba-ssm are on its path."""
    usual: bool = True
    """Whether it runs where no stages are named."""


TASKS = (
    Task("versions", "versions", 40),
    Task("roofs", "roofs", 40),
    Task("tests", "tests", 140, together="checks"),
    Task("tests", "warm", 110, together="checks", packages=True),
    Task("model", "model", 80, together="checks"),
    Task("cli", "cli", 110, together="checks"),
    Task("ops", "ops", 90, packages=True),
    Task("step", "step", 50, ("--variant", "auto")),
    Task("step", "step", 45, ("--variant", "named")),
    Task("step", "step", 45, ("--variant", "fp8_current")),
    Task("before", "step", 45, ("--variant", "before")),
    Task("formats", "step", 45, ("--variant", "fp8_block"), usual=False),
    Task("formats", "step", 45, ("--variant", "mxfp8"), usual=False),
    Task("formats", "step", 45, ("--variant", "nvfp4"), usual=False),
    Task("decode", "decode", 110),
    Task("peer", "peer", 100, packages=True),
    Task("sol", "sol", 100, usual=False),
    Task("tune", "tune", 100, usual=False),
)
"""In the order in which they run; a group of tasks side by side ends before the next one begins."""

STAGES = tuple(dict.fromkeys(task.stage for task in TASKS))
SPARE = 8.0
"""Seconds that a stage has to end by itself after its limit."""


def main() -> int:
    options = _options()
    usual = [task.stage for task in TASKS if task.usual]
    chosen = options.stages.split(",") if options.stages else usual
    unknown = sorted(set(chosen) - set(STAGES) - {"warm"})
    if unknown:
        print(f"unknown stages: {', '.join(unknown)}; there are {', '.join(STAGES)}, warm")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    tasks = [p for p in TASKS if p.stage in chosen or (p.module == "warm" and "warm" in chosen)]
    scale, begin = options.seconds / USUAL, time.monotonic()
    seconds: dict[str, dict[str, object]] = {}
    while tasks:
        group = [tasks.pop(0)]
        while tasks and group[0].together and tasks[0].together == group[0].together:
            group.append(tasks.pop(0))
        for task, (took, code) in zip(group, _run(group, scale, options), strict=True):
            key = " ".join([task.module, *task.words[1:]])
            seconds[key] = {"seconds": round(took, 1), "exit_code": code}
            print(f"{key}: {took:.1f} s, exit code {code}", flush=True)
        _pack(options, seconds)
    total = time.monotonic() - begin
    print(_pack(options, seconds), flush=True)
    print(json.dumps(summary(options.out, total)), flush=True)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of results")
    parser.add_argument("--pack", type=Path, help="folder for few files that hold all others")
    parser.add_argument("--stages", help=f"of {','.join(STAGES)},warm; default: all but tune")
    parser.add_argument("--seconds", type=float, default=USUAL, help="scales every limit")
    parser.add_argument("--packages", type=Path, help="folder that holds mamba_ssm's sources")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to show bugs")
    return parser.parse_args()


def _pack(options: argparse.Namespace, seconds: dict[str, dict[str, object]]) -> str:
    """Write the table of what there is so far, and put all files into few; return the table."""
    text = table(options.out, seconds)
    (options.out / "table.txt").write_text(text)
    if options.pack is not None:
        options.pack.mkdir(parents=True, exist_ok=True)
        # among them a new tuning base
        for path in (
            options.out / "table.txt",
            options.out / RESULTS,
            *options.out.glob("sm*.json"),
        ):
            if path.exists():
                shutil.copy(path, options.pack)
        with tarfile.open(options.pack / "logs.tar.gz", "w:gz") as archive:
            archive.add(options.out, "gpu_check")
    return text


def _run(
    group: list[Task], scale: float, options: argparse.Namespace
) -> list[tuple[float, int | str]]:
    """Run tasks beside each other; return each one's seconds and exit code."""
    begin = time.monotonic()
    running = [_start(task, task.seconds * scale, options) for task in group]
    found: list[tuple[float, int | str] | None] = [None] * len(group)
    while None in found:
        for number, (task, process) in enumerate(zip(group, running, strict=True)):
            if found[number] is not None:
                continue
            took = time.monotonic() - begin
            if (code := process.poll()) is not None:
                found[number] = took, code
            elif took > task.seconds * scale + SPARE:
                # its own children, too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                found[number] = took, "no end in time"
        time.sleep(0.05)
    return [result for result in found if result is not None]


def _start(task: Task, seconds: float, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if task.packages and options.packages is not None:
        paths = [environment.get("PYTHONPATH", ""), str(options.packages.resolve())]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["TRITON_CACHE_AUTOTUNING"] = "1"
    words = ["--out", str(options.out), "--seconds", f"{seconds:.0f}", *task.words]
    if options.tiny:
        environment["TRITON_INTERPRET"] = "1"
        words.append("--tiny")
    name = "_".join([task.module, *task.words[1:]])
    return subprocess.Popen(
        [sys.executable, str(HERE / f"stage_{task.module}.py"), *words],
        stdout=(options.out / f"log_{name}.txt").open("w"),
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


if __name__ == "__main__":
    sys.exit(main())
