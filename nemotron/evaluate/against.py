"""What changes from one model to another on the same answers and the same text."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemotron.posttrain.suites.samples import Sample
from nemotron.posttrain.suites.statistics import Estimate


@dataclass(frozen=True)
class Delta:
    """Reward of a model minus that of the reference, on the same rows."""

    task: str
    budget: int | None
    difference: Estimate
    """Mean over the rows that both have judged answers to; its error is that of pairs."""
    rows: int

    def __str__(self) -> str:
        budget = "" if self.budget is None else f"budget {self.budget:>5}  "
        mean, error = self.difference.mean, self.difference.error
        value = "nothing to compare" if mean is None else f"{mean:+.3f}"
        return f"{self.task:<20} {budget}reward {value}" + (
            "" if error is None else f" ± {error:.3f}"
        )


def deltas(ours: Sequence[Sample], theirs: Sequence[Sample]) -> list[Delta]:
    """Return what changes for each task and budget."""
    first, second = _means(ours), _means(theirs)
    found = []
    for task, budget in dict.fromkeys((s.task, s.budget) for s in ours):
        mine, other = first[task, budget], second.get((task, budget), {})
        pairs = [mine[number] - other[number] for number in mine if number in other]
        found.append(Delta(task, budget, Estimate.of(pairs), len(pairs)))
    return found


def _means(samples: Sequence[Sample]) -> dict[tuple[str, int | None], dict[int, float]]:
    """Return the mean reward of each row, of those with a judged answer."""
    rewards: dict[tuple[str, int | None], dict[int, list[float]]] = {}
    for sample in samples:
        rows = rewards.setdefault((sample.task, sample.budget), {})
        if sample.verdict.error is None:
            rows.setdefault(sample.number, []).append(sample.verdict.reward)
    return {
        key: {number: float(np.mean(found)) for number, found in rows.items()}
        for key, rows in rewards.items()
    }
