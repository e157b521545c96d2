"""Stage 3: the tests that need a GPU, and those of the Triton kernels, which run compiled there.

The two groups run beside each other. Only files that hold such tests are collected.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

from stage import ROOT, Stage, parser

SUMMARY = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed)")
FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", re.MULTILINE)
KERNELS = re.compile(r'importorskip\("triton|cuda\.is_available\(\) else "cpu"')
"""Marks of files whose tests run on a GPU where there is one, else in Triton's interpreter."""
WORKERS = 6


def main() -> None:
    stage = Stage("tests", parser(__doc__).parse_args())
    tests = ROOT / "tests"
    marked = [p for p in sorted(tests.rglob("test_*.py")) if "mark.gpu" in p.read_text()]
    kernels = [
        path
        for folder in ("ops", "precision")
        for path in sorted((tests / folder).glob("test_*.py"))
        if KERNELS.search(path.read_text())
    ]
    groups = {"gpu": (marked, ["-m", "gpu"]), "kernels": (kernels, [])}
    running = {}
    for name, (files, words) in groups.items():
        if not files:
            stage.emit(name, skipped="no such file of tests")
            continue
        log = (stage.out / f"tests_{name}.txt").open("w")
        running[name] = subprocess.Popen(
            _command(files[:1] if stage.tiny else files, words, stage.tiny),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    for name, process in running.items():
        ended = True
        try:
            process.wait(timeout=max(1.0, stage.left()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            ended = False
        text = (stage.out / f"tests_{name}.txt").read_text(errors="replace")
        stage.emit(name, **counts(text), finished=ended, **failures(text))


def _command(files: list[Path], words: list[str], tiny: bool) -> list[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rfE",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:benchmark",
        "--tb=short",
    ]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "1" if tiny else str(WORKERS)]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["--timeout", "100"]
    return [*command, *words, *(str(path.relative_to(ROOT)) for path in files)]


def counts(text: str) -> dict[str, int]:
    """Return how many tests ended how, from pytest's last line that says it."""
    for line in reversed(text.splitlines()):
        if found := SUMMARY.findall(line):
            return {word: int(number) for number, word in found}
    return {}


def failures(text: str) -> dict[str, object]:
    """Return each failure's test and its reason, on one line each."""
    found = [f"{test.split('::', 1)[-1]}: {why}"[:150] for test, why in FAILURE.findall(text)]
    return {"failures": found[:15], "flag": "WRONG"} if found else {}


if __name__ == "__main__":
    main()
