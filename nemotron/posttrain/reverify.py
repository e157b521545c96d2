"""Stored rollouts judged again, which shows verifiers that changed or are not deterministic."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from nemotron.errors import UserError
from nemotron.files import NO_FILE_OF_OURS, open_regular, parse_json, write_text
from nemotron.outputs import check_new
from nemotron.posttrain.config import RlConfig
from nemotron.posttrain.environments.base import environment_of
from nemotron.posttrain.recount import Count, print_counts
from nemotron.posttrain.rollout import Rollout, rollout_lines
from nemotron.posttrain.tasks import Tasks
from nemotron.posttrain.verify import Verifiers
from nemotron.run.files import RunFiles


def reverify(config: RlConfig, run: Path, out: Path | None) -> int:
    """Judge all rollouts of a run again, and print what changed, by environment.

    `out` is a folder that gets the rollouts with their new verdicts. Returns exit code 1 if a
    verdict changed, else 0.

    Raises:
        UserError: when the run has no rollouts, a file is damaged or an environment cannot run.
    """
    stored = RunFiles(run).rollouts
    files = sorted(stored.glob("step-*.jsonl"))
    if not files:
        raise UserError(
            "has no rollouts/step-*.jsonl; give the folder of a run with some.", where=str(run)
        )
    if out is not None and out.resolve() == stored.resolve():
        raise UserError(
            "holds the rollouts to judge; choose another folder for --out.", where=str(out)
        )
    if out is not None:
        for path in files:
            check_new(out / path.name, "--out")
    counts: dict[str, Count] = {}
    tasks = Tasks(config)
    with tasks.verifiers() as verifiers:
        for path in files:
            old = list(read_rollouts(path))
            new = _judge(old, verifiers, config.rollout.verify_timeout_s)
            for first, second in zip(old, new, strict=True):
                count = counts.setdefault(first.task.environment, Count())
                count.add(first.verdict, second.verdict)
            if out is not None:
                out.mkdir(parents=True, exist_ok=True)
                write_text(out / path.name, rollout_lines(new))
    return print_counts(counts, "rollouts")


def read_rollouts(path: Path) -> Iterator[Rollout]:
    """Yield the rollouts of a file.

    Raises:
        UserError: with the line that is not a rollout.
    """
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                rollout = Rollout.of_json(parse_json(line))
                environment_of(rollout.task.row)
            except ValueError:
                raise UserError(
                    "is not a rollout; restore the file, or remove the line.",
                    where=f"{path}:{number}",
                ) from None
            yield rollout


def _open(path: Path) -> BinaryIO:
    try:
        return os.fdopen(open_regular(path, os.O_RDONLY), "rb")
    except OSError as error:
        if error.errno not in NO_FILE_OF_OURS:
            raise
        rule = f"cannot be read: {error.strerror}; restore the file, or remove it."
        raise UserError(rule, where=str(path)) from None


def _judge(rollouts: Sequence[Rollout], verifiers: Verifiers, timeout_s: float) -> list[Rollout]:
    rows = [rollout.task.row for rollout in rollouts]
    responses = [rollout.response for rollout in rollouts]
    faults = [rollout.tool_fault for rollout in rollouts]
    verdicts = verifiers.verify(rows, responses, [None] * len(rows), timeout_s, faults)
    return [
        dataclasses.replace(rollout, verdict=verdict)
        for rollout, verdict in zip(rollouts, verdicts, strict=True)
    ]
