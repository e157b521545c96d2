"""Judged answers, added up for each task."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemotron.posttrain.suites.samples import Sample
from nemotron.posttrain.suites.statistics import Estimate, majority, pass_at, sizes


@dataclass(frozen=True)
class Result:
    """How well the rows of one task were answered, with one budget of reasoning."""

    task: str
    budget: int | None
    """Tokens after which reasoning was closed; None: never."""
    tasks: int
    """Rows of which an answer was judged."""
    samples: int
    """Answers to each row (avg@k)."""
    reward: float | None
    """Mean over rows of the mean reward; None if nothing was judged."""
    error: float | None
    """Standard error of that mean; None for a single row."""
    pass_at: dict[int, Estimate]
    """Share of rows of which one of k answers has the full reward; of rows with no fault."""
    majority: Estimate | None
    """Reward of each row's most frequent answer; None where verifiers extract no answer."""
    answer_tokens: float
    """Mean length, reasoning included."""
    truncated: float
    """Share of the answers that reached the largest length."""
    verifier_faults: int
    """Answers that could not be judged, which no figure counts as right or wrong."""

    def __str__(self) -> str:
        budget = "" if self.budget is None else f"budget {self.budget:>5}  "
        faults = f"  {self.verifier_faults} verifier faults" if self.verifier_faults else ""
        more = [f"pass@{k} {found}" for k, found in self.pass_at.items() if k > 1]
        if self.majority is not None and self.samples > 1:
            more.append(f"maj@{self.samples} {self.majority}")
        parts = [
            f"{self.task:<20} {budget}reward {Estimate(self.reward, self.error)}",
            *more,
            f"{self.tasks} tasks",
            f"{self.answer_tokens:.1f} tokens",
            f"{self.truncated:.1%} truncated{faults}",
        ]
        return "  ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return dataclasses.asdict(self)


def summarize(samples: Sequence[Sample]) -> list[Result]:
    """Return a result for each task and budget, in the order in which they come."""
    groups: dict[tuple[str, int | None], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.task, sample.budget), []).append(sample)
    return [_summarize(task, budget, own) for (task, budget), own in groups.items()]


def _summarize(task: str, budget: int | None, own: Sequence[Sample]) -> Result:
    rows: dict[int, list[Sample]] = {}
    for sample in own:
        rows.setdefault(sample.number, []).append(sample)
    size = max(map(len, rows.values()))
    judged = [[s for s in row if s.verdict.error is None] for row in rows.values()]
    judged = [row for row in judged if row]
    whole = [row for row in judged if len(row) == size]
    reward = Estimate.of([float(np.mean([s.verdict.reward for s in row])) for row in judged])
    right = [sum(s.verdict.reward >= 1 for s in row) for row in whole]
    extracts = any(s.verdict.extracted is not None for row in judged for s in row)
    return Result(
        task=task,
        budget=budget,
        tasks=len(judged),
        samples=size,
        reward=reward.mean,
        error=reward.error,
        pass_at={k: Estimate.of([pass_at(k, size, c) for c in right]) for k in sizes(size)},
        majority=Estimate.of([_majority(row) for row in whole]) if extracts else None,
        answer_tokens=float(np.mean([s.num_tokens for s in own])),
        truncated=float(np.mean([s.is_truncated for s in own])),
        verifier_faults=len(own) - sum(map(len, judged)),
    )


def _majority(row: Sequence[Sample]) -> float:
    return majority([s.verdict.extracted for s in row], [s.verdict.reward for s in row])
