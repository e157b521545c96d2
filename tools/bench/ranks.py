"""What processes cost: FSDP2 on one rank against none, two ranks against one with two threads.

    python tools/bench/ranks.py [RECIPE] [--steps N] [--rounds N] [--json FILE]

Every case is a run of its own, the cases take turns, and of each the median step is kept, the first
ones left out. Ratios of one call are to be quoted, never its seconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from machine import describe
from rich.console import Console
from rich.table import Table

from nemotron.run.metrics import read_metrics

ROOT = Path(__file__).parents[2]
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """A number of ranks, each with so many threads; 0 ranks: no process group at all."""

    name: str
    ranks: int
    threads: int


ALONE = Case("1 process, 1 thread", 0, 1)
SHARDED = Case("FSDP2 on 1 rank, 1 thread", 1, 1)
THREADS = Case("1 process, 2 threads", 0, 2)
RANKS = Case("FSDP2 on 2 ranks, 1 thread each", 2, 1)
PAIRS = [(SHARDED, ALONE), (RANKS, THREADS)]


def seconds_per_step(case: Case, recipe: str, steps: int, folder: Path) -> list[float]:
    """Train and return the seconds of each step after the first ones."""
    name = f"run-{len(list(folder.iterdir()))}"
    command = [sys.executable, "-m", "nemotron"]
    if case.ranks:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(case.ranks), "-m", "nemotron"]
    settings = [
        "device=cpu",
        f"output={folder}",
        f"name={name}",
        f"schedule.total_steps={steps}",
        "schedule.warmup_steps=1",
        "schedule.decay_steps=1",
        "evaluation.tokens=1",
    ]
    done = subprocess.run(
        [*command, "train", recipe, *settings],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": str(case.threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{case.name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    records = read_metrics(folder / name / "metrics.jsonl")
    times = [float(r["perf/step_s"] or 0) for r in records if r["kind"] == "train"]
    return times[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", nargs="?", default="recipes/tiny/pretrain.yaml")
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file to which one line is appended")
    arguments = parser.parse_args()
    cases = [case for pair in PAIRS for case in pair]
    times: dict[str, list[float]] = {case.name: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.rounds):
            for case in cases:
                found = seconds_per_step(case, arguments.recipe, arguments.steps, Path(folder))
                times[case.name].append(statistics.median(found))
    table = Table("case", "seconds a step, each round", "tokens/s of the other", title="Ranks")
    ratios = {}
    for case, other in PAIRS:
        per_round = zip(times[other.name], times[case.name], strict=True)
        ratio = statistics.median(a / b for a, b in per_round)
        ratios[f"{case.name} / {other.name}"] = ratio
        for row, note in ((other, ""), (case, f"{ratio:.2f}x")):
            seconds = ", ".join(f"{second:.3f}" for second in times[row.name])
            table.add_row(row.name, seconds, note)
    Console().print(table)
    if arguments.json:
        line = {"machine": describe(), "seconds": times, "ratios": ratios}
        with open(arguments.json, "a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
