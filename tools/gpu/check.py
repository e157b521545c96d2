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
"""Seconds of the whole programme by default; other values scale each stage's limit."""


@dataclass(frozen=True)
class Part:
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


PARTS = (
    Part("versions", "versions", 40),
    Part("roofs", "roofs", 40),
    Part("tests", "tests", 140, together="checks"),
    Part("tests", "warm", 110, together="checks", packages=True),
    Part("model", "model", 80, together="checks"),
    Part("cli", "cli", 110, together="checks"),
    Part("ops", "ops", 90, packages=True),
    Part("step", "step", 50, ("--variant", "auto")),
    Part("step", "step", 45, ("--variant", "fp8_current")),
    Part("before", "step", 45, ("--variant", "before")),
    Part("formats", "step", 45, ("--variant", "fp8_block"), usual=False),
    Part("formats", "step", 45, ("--variant", "mxfp8"), usual=False),
    Part("formats", "step", 45, ("--variant", "nvfp4"), usual=False),
    Part("decode", "decode", 60),
    Part("peer", "peer", 100, packages=True),
    Part("tune", "tune", 100, usual=False),
)
"""In the order in which they run; a group of parts side by side ends before the next one begins."""

STAGES = tuple(dict.fromkeys(part.stage for part in PARTS))
SPARE = 8.0
"""Seconds that a stage has to end by itself after its limit."""


def main() -> int:
    options = _options()
    usual = [part.stage for part in PARTS if part.usual]
    chosen = options.stages.split(",") if options.stages else usual
    unknown = sorted(set(chosen) - set(STAGES) - {"warm"})
    if unknown:
        print(f"unknown stages: {', '.join(unknown)}; there are {', '.join(STAGES)}, warm")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    parts = [p for p in PARTS if p.stage in chosen or p.module in chosen]
    scale, begin = options.seconds / USUAL, time.monotonic()
    seconds: dict[str, dict[str, object]] = {}
    while parts:
        group = [parts.pop(0)]
        while parts and group[0].together and parts[0].together == group[0].together:
            group.append(parts.pop(0))
        for part, (took, code) in zip(group, _run(group, scale, options), strict=True):
            key = " ".join([part.module, *part.words[1:]])
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
    group: list[Part], scale: float, options: argparse.Namespace
) -> list[tuple[float, int | str]]:
    """Run parts beside each other; return each one's seconds and exit code."""
    begin = time.monotonic()
    running = [_start(part, part.seconds * scale, options) for part in group]
    found: list[tuple[float, int | str] | None] = [None] * len(group)
    while None in found:
        for number, (part, process) in enumerate(zip(group, running, strict=True)):
            if found[number] is not None:
                continue
            took = time.monotonic() - begin
            if (code := process.poll()) is not None:
                found[number] = took, code
            elif took > part.seconds * scale + SPARE:
                # its own children, too
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                found[number] = took, "no end in time"
        time.sleep(0.05)
    return [result for result in found if result is not None]


def _start(part: Part, seconds: float, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    if part.packages and options.packages is not None:
        paths = [environment.get("PYTHONPATH", ""), str(options.packages.resolve())]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        environment["TRITON_CACHE_AUTOTUNING"] = "1"
    words = ["--out", str(options.out), "--seconds", f"{seconds:.0f}", *part.words]
    if options.tiny:
        environment["TRITON_INTERPRET"] = "1"
        words.append("--tiny")
    name = "_".join([part.module, *part.words[1:]])
    return subprocess.Popen(
        [sys.executable, str(HERE / f"stage_{part.module}.py"), *words],
        stdout=(options.out / f"log_{name}.txt").open("w"),
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


if __name__ == "__main__":
    sys.exit(main())
