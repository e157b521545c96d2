"""What several answers to each of many tasks say about a model, with standard errors.

A task is what is drawn at random, and its answers belong together, so errors are those of means
over tasks.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks, and its standard error; None where one task or none cannot say it."""

    mean: float | None
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Return that of one value for each task."""
        if not values:
            return cls(None, None)
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        error = deviation / math.sqrt(len(values))
        return cls(float(np.mean(values)), None if math.isnan(error) else error)

    def __str__(self) -> str:
        if self.mean is None:
            return "none judged"
        return f"{self.mean:.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


def pass_at(k: int, answers: int, right: int) -> float:
    """Return the probability that one of `k` answers, drawn from those given, is right.

    It is unbiased for the probability that one of `k` new answers is.
    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", section 2.1.
    """
    assert 0 <= right <= answers, f"{right} of {answers} are right"
    assert 1 <= k <= answers, f"{k} of {answers} are drawn"
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def majority(extracted: Sequence[str | None], rewards: Sequence[float]) -> float:
    """Return the expected reward of the most frequent answer; ties are broken by chance.

    An answer is what its verifier extracted; None votes for nothing. Equal answers whose rewards
    differ count with their mean.
    """
    by_answer = defaultdict(list)
    for answer, reward in zip(extracted, rewards, strict=True):
        if answer is not None:
            by_answer[answer].append(reward)
    votes = Counter({answer: len(found) for answer, found in by_answer.items()})
    if not votes:
        return 0.0
    most = max(votes.values())
    first = [float(np.mean(by_answer[answer])) for answer, count in votes.items() if count == most]
    return float(np.mean(first))


def sizes(samples: int) -> list[int]:
    """Return the k of pass@k that so many answers show: powers of two, and all of them."""
    powers = [2**i for i in range(samples.bit_length()) if 2**i < samples]
    return [*powers, samples]
