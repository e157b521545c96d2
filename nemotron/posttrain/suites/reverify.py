"""Answers of an evaluation judged again, which shows verifiers that changed since."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemotron.errors import UserError
from nemotron.files import open_regular, parse_json, write_text
from nemotron.outputs import check_new
from nemotron.posttrain.environments.base import environment_of
from nemotron.posttrain.recount import Count, print_counts
from nemotron.posttrain.suites.definition import LIKELIHOOD
from nemotron.posttrain.suites.samples import Sample
from nemotron.posttrain.suites.suites import SuiteSettings
from nemotron.posttrain.verify import Verifiers
from nemotron.run.files import RunFiles
from nemotron.terminal import print_text

SETTINGS = ".settings.json"
"""Ending of what lies beside the answers of an evaluation."""


def answer_files(folder: Path) -> list[Path]:
    """Return the files with answers in the folder of an evaluation or of a run with suites."""
    files = sorted(path for path in folder.glob("*.jsonl") if path.with_suffix(SETTINGS).exists())
    return files or sorted(RunFiles(folder).suites.glob("step-*.jsonl"))


def reverify_answers(files: Sequence[Path], out: Path | None) -> int:
    """Judge stored answers again, and print what changed, by task.

    What was chosen by its probability has no verifier, and stays. `out` is a folder that gets the
    answers with their new verdicts. Returns exit code 1 if a verdict changed, else 0.

    Raises:
        UserError: when a file is damaged, or an environment cannot run.
    """
    if out is not None and out.resolve() == files[0].parent.resolve():
        raise UserError(
            "holds the answers to judge; choose another folder for --out.", where=str(out)
        )
    if out is not None:
        for path in files:
            check_new(out / path.name, "--out")
    counts: dict[str, Count] = {}
    kept: set[str] = set()
    settings = SuiteSettings()
    with Verifiers(settings.verify_workers) as verifiers:
        for path in files:
            old = list(_read(path))
            new = _judge(old, verifiers, settings.verify_timeout_s)
            for first, second in zip(old, new, strict=True):
                if LIKELIHOOD in first.task:
                    kept.add(first.task)
                else:
                    counts.setdefault(first.task, Count()).add(first.verdict, second.verdict)
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                write_text(out / path.name, "".join(sample.as_line() for sample in new))
    for task in sorted(kept):
        print_text(f"{task:<16} has no verifier: the likeliest option was chosen")
    return print_counts(counts, "answers")


def _judge(samples: Sequence[Sample], verifiers: Verifiers, timeout_s: float) -> list[Sample]:
    judged = [number for number, sample in enumerate(samples) if LIKELIHOOD not in sample.task]
    verdicts = verifiers.verify(
        [samples[number].row for number in judged],
        [samples[number].response for number in judged],
        [None] * len(judged),
        timeout_s,
    )
    new = list(samples)
    for number, verdict in zip(judged, verdicts, strict=True):
        new[number] = dataclasses.replace(samples[number], verdict=verdict)
    return new


def _read(path: Path) -> Iterator[Sample]:
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                sample = Sample.of_json(parse_json(line))
                environment_of(sample.row)
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    "is not an answer; restore the file, or remove the line.",
                    where=f"{path}:{number}",
                ) from None
            yield sample
