"""Beside stage 3: compile what the timed stages will need, in processes beside each other.

Triton compiles one configuration after the other; its cache on disk is shared, so each operation
has a process here, and mamba-ssm's configurations are dealt to several.
"""

import subprocess
import sys
import time
from pathlib import Path

from stage import Stage, one_line, parser

from nemotron.ops.apply import ALL

AT_ONCE = 10
PARTS = 8
"""Processes that share mamba-ssm's configurations."""


def main() -> None:
    stage = Stage("warm", parser(__doc__).parse_args())
    begin = time.monotonic()
    failed: dict[str, int | str] = {}
    running: dict[str, subprocess.Popen[bytes]] = {}
    waiting = commands()
    if stage.tiny:
        waiting = [waiting[0], waiting[-1]]
    total = len(waiting)
    while (waiting or running) and stage.left() > 0:
        while waiting and len(running) < AT_ONCE:
            module, *words = waiting.pop(0)
            running[" ".join([module, *words])] = _start(stage, module, words)
        for key, process in list(running.items()):
            if process.poll() is not None:
                del running[key]
                if process.returncode:
                    failed[key] = process.returncode
        time.sleep(0.1)
    for key, process in running.items():
        process.kill()
        failed[key] = "no time left"
    seconds = round(time.monotonic() - begin, 1)
    stage.emit("compiled", seconds=seconds, processes=total, failed=failed)


def commands() -> list[list[str]]:
    """Return each process's module and words, the longest first."""
    found = [["step", "--variant", variant] for variant in ("auto", "fp8_current")]
    found += [["ops", "--only", "ssd", "--part", f"{part}/{PARTS}"] for part in range(PARTS)]
    names = [operation.name for operation in ALL if operation.name != "ssd"]
    return found + [["ops", "--only", name] for name in names]


def _start(stage: Stage, module: str, words: list[str]) -> subprocess.Popen[bytes]:
    folder = stage.out / "warm"
    folder.mkdir(exist_ok=True)
    name = "_".join([module, *words[1::2]]).replace("/", "_of_")
    words = [*words, "--once", "--out", str(folder), "--seconds", str(max(1, int(stage.left())))]
    if stage.tiny:
        words.append("--tiny")
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name(f"stage_{module}.py")), *words],
        stdout=(folder / f"{name}.txt").open("w"),
        stderr=subprocess.STDOUT,
    )


if __name__ == "__main__":
    try:
        main()
    except Exception as problem:
        print(one_line(problem), file=sys.stderr)
        raise
