"""Train every arm of the comparisons of docs/correction.md, and print their table.

    python tools/correction_table.py --out runs/correction-table           # takes an hour or more
    python tools/correction_table.py --out runs/correction-table --only masks --seeds 1 2
    python tools/correction_table.py --out runs/correction-table --table   # what is there so far
    python tools/correction_table.py --out runs/correction-table --latency # ms a sentence

The commands are those of a user: `nemotron data`, `train`, `correct` and `score`, run in the
folder --out. Each result is a line of results.jsonl in it; a repeated command goes on where it
stopped. All arms of a comparison have the same data, steps and seeds. The table has the mean of
the paired differences over the seeds, and its standard error.
"""

import argparse
import contextlib
import io
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from correction_arms import ARMS, COMPARISONS, DATA, Arm, Comparison, Figure, arms_of

import nemotron.cli
from nemotron.data.correct.marks import marks_of
from nemotron.data.correct.pairs import read_rows
from nemotron.data.indexed import Shard
from nemotron.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
SEEDS = (1, 2, 3)
TIMED = ("one-pass", "soft", "duration", "written")
"""Arms of which the time is taken, all of one size."""
WARM_UP, TAKEN = 20, 200
"""Sentences that are corrected before, and those of which the median is taken."""

Result = dict[str, Any]  # Any: JSON


@dataclass(frozen=True)
class Effect:
    """Paired differences over seeds."""

    without: float
    """Mean of the arm without."""
    with_: float
    difference: float
    """Mean of with minus without."""
    error: float
    """Standard error of the mean difference; NaN of one seed."""
    seeds: int


def effect(without: Sequence[float], with_: Sequence[float]) -> Effect:
    """Return the effect over seeds, of which both arms have the same, in the same order."""
    differences = [b - a for a, b in zip(without, with_, strict=True)]
    number = len(differences)
    error = statistics.stdev(differences) / math.sqrt(number) if number > 1 else math.nan
    mean = statistics.fmean
    return Effect(mean(without), mean(with_), mean(differences), error, number)


@dataclass(frozen=True)
class Folder:
    """Where everything is written."""

    path: Path

    @property
    def file(self) -> Path:
        return self.path / "results.jsonl"

    def results(self) -> dict[tuple[str, int], Result]:
        """Return what is there, by arm and seed; the last line counts."""
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        found = [json.loads(line) for line in lines]
        return {(each["arm"], each["seed"]): each for each in found}

    def append(self, result: Result) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(result) + "\n")

    def run(self, *words: str) -> str:
        """Run a command of nemotron, or a tool; returns what it wrote to standard output.

        Raises:
            SystemExit: when it fails.
        """
        said = io.StringIO()
        with contextlib.chdir(self.path), contextlib.redirect_stdout(said):
            if words[0] == "two_languages":
                tool = [sys.executable, str(ROOT / "tools/two_languages.py"), *words[1:]]
                code = subprocess.run(tool, check=False).returncode
            else:
                code = nemotron.cli.run(list(words))
        if code:
            raise SystemExit(f"{' '.join(words)}\n{said.getvalue()[-2000:]}ended with {code}")
        return said.getvalue()

    def make_data(self, names: Iterable[str]) -> None:
        """Make what is missing of the data.

        Raises:
            SystemExit: when a sentence to be tested is one to train on.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for name in names:
            for made, words in DATA[name].items():
                if not (self.path / made).exists():
                    self.run(*words.split())
        files = [self.path / f"data/{name}/text.jsonl" for name in ("correct", "test")]
        if all(file.is_file() for file in files):
            trained, tested = (texts_of(file) for file in files)
            if trained & tested:
                raise SystemExit("data/test: has sentences of data/correct")

    def train(self, arm: Arm, seed: int) -> Result:
        """Train an arm and return its measures."""
        name = f"{arm.name}-{seed}"
        start = time.process_time()
        if not self.is_trained(name):
            resumes = any((self.path / "runs" / name / "checkpoints").glob("step-*"))
            self.run("train", *settings(arm, seed), *(["--resume"] if resumes else []))
        taken = time.process_time() - start
        measured = self.measured(arm, f"runs/{name}")
        return {
            "arm": arm.name,
            "seed": seed,
            "train_cpu_s": round(taken, 1),
            **measured,
        }

    def is_trained(self, name: str) -> bool:
        status = self.path / "runs" / name / "status.json"
        return status.is_file() and json.loads(status.read_text()).get("state") == "done"

    def measured(self, arm: Arm, run: str) -> Result:
        """Return the measures of a trained arm."""
        found = validation(self.path / run)
        if arm.recipe == "duration":
            found["duration_one"] = self.share_of_ones()
        if arm.measure in ("parallel", "ar"):
            out = f"{run}/answers.jsonl"
            words = ("correct", run, "--in", "data/test/pairs.jsonl", "--out", out, "--overwrite")
            self.run(*words, *(["--ar"] if arm.measure == "ar" else []))
            scores = self.run("score", out, "--references", "data/test/pairs.jsonl", "--json")
            found |= json.loads(scores)
        return found

    def share_of_ones(self) -> float:
        """Return how often one would be right as the duration of a held-out token."""
        marks = marks_of(load_tokenizer(str(self.path / "data/correct/tokenizer.json")))
        shard = Shard(self.path / "data/correct/pairs4/validation-00000")
        lines = [row.durations[row.columns != marks.void] for row in read_rows(shard)]
        return float((np.concatenate(lines) == 1).mean())

    def latency(self, name: str, measure: str | None) -> float:
        """Return the median time of a sentence, in ms, each corrected by itself."""
        lines = (self.path / "data/test/pairs.jsonl").read_text().splitlines(keepends=True)
        (self.path / "timed.jsonl").write_text("".join(lines[: WARM_UP + TAKEN]))
        out = f"runs/{name}/timed.jsonl"
        words = ["correct", f"runs/{name}", "--in", "timed.jsonl", "--out", out, "--overwrite"]
        self.run(*words, "--timed", *(["--ar"] if measure == "ar" else []))
        answers = (self.path / out).read_text().splitlines()[WARM_UP:]
        return statistics.median(json.loads(line)["ms"] for line in answers)


def texts_of(file: Path) -> set[str]:
    return {json.loads(line)["text"] for line in file.read_text().splitlines()}


def settings(arm: Arm, seed: int) -> list[str]:
    """Return the recipe of an arm's run, and what is set beside it."""
    words = [str(ROOT / "recipes/correct" / f"{arm.recipe}.yaml"), *arm.settings]
    words += [f"name={arm.name}-{seed}", f"seed={seed}"]
    return [*words, f"init_from=runs/{arm.needs}-{seed}"] if arm.needs else words


def validation(run: Path) -> Result:
    """Return the measures of the last evaluation of a run."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if record["kind"] == "validation"]
    last = found[-1] if found else {}
    return {name: value for name, value in last.items() if name.startswith("validation/")}


def pairs_of(
    figure: Figure, each: Comparison, results: dict[tuple[str, int], Result]
) -> list[tuple[float, float]]:
    """Return the measure without and with, of each seed that both arms have."""
    seeds = sorted({seed for _, seed in results})
    found = [(results.get((each.without, s)), results.get((each.with_, s))) for s in seeds]
    other = figure.other or figure.key
    return [
        (a[other], b[figure.key]) for a, b in found if a and b and other in a and figure.key in b
    ]


def table(results: dict[tuple[str, int], Result]) -> Iterator[str]:
    """Yield the lines of the table, in Markdown."""
    yield "| Question | Measure | Without | With | Difference | Seeds |"
    yield "|---|---|---|---|---|---|"
    for each in COMPARISONS:
        for figure in each.figures:
            pairs = pairs_of(figure, each, results)
            if not pairs:
                continue
            found = effect([a for a, _ in pairs], [b for _, b in pairs])
            cells = [each.question, figure.title, *map(shown, (found.without, found.with_))]
            error = f" ± {found.error:.4f}" if found.seeds > 1 else ""
            cells += [f"{found.difference:+.4f}{error}", str(found.seeds)]
            yield f"| {' | '.join(cells)} |"


def shown(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def latencies(folder: Folder, seed: int) -> Iterator[str]:
    """Yield the lines of a table: the time of a sentence beside the quality, of one seed."""
    results = folder.results()
    yield "| Arm | ms a sentence | CER | correction F0.5 |"
    yield "|---|---|---|---|"
    for arm in ARMS:
        if arm.name in TIMED and (result := results.get((arm.name, seed))):
            taken = folder.latency(f"{arm.name}-{seed}", arm.measure)
            cer, f05 = result["answer_cer"], result["correction_f0.5"]
            yield f"| {arm.name} | {taken:.1f} | {cer:.4f} | {f05:.3f} |"


def work(folder: Folder, comparisons: Sequence[Comparison], seeds: Sequence[int]) -> None:
    """Train what is missing: every arm of the first seed, then of the next."""
    arms = arms_of(comparisons)
    folder.make_data({arm.data: None for arm in arms})
    for seed in seeds:
        for arm in arms:
            if (arm.name, seed) not in folder.results():
                result = folder.train(arm, seed)
                folder.append(result)
                print(json.dumps(result), flush=True)


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to work in")
    names = [each.name for each in COMPARISONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="comparisons")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--table", action="store_true", help="print only what is there")
    parser.add_argument("--latency", action="store_true", help="print the time of a sentence")
    given = parser.parse_args()
    folder = Folder(given.out.absolute())
    if given.latency:
        print("\n".join(latencies(folder, given.seeds[0])))
        return
    if not given.table:
        work(folder, [each for each in COMPARISONS if each.name in given.only], given.seeds)
    print("\n".join(table(folder.results())))


if __name__ == "__main__":
    main()
