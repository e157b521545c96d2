"""The log-probability below which a token is taken for wrong."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOTHING = -1e9
"""A threshold that no token reaches."""


@dataclass(frozen=True)
class Threshold:
    """A threshold, and how well it separates wrong tokens from right ones."""

    value: float
    f1: float


def best_threshold(scores: NDArray[np.float64], is_wrong: NDArray[np.bool_]) -> Threshold:
    """Return the threshold with the highest F1; tokens with a score up to it are flagged.

    Without a wrong token, or a token at all, nothing is to be flagged.
    """
    if not is_wrong.any():
        return Threshold(NOTHING, 0.0)
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    hits = np.cumsum(is_wrong[order])
    flagged = np.arange(1, len(order) + 1)
    f1 = 2 * hits / (flagged + is_wrong.sum())
    # equal scores are flagged together
    ends = np.append(ordered[1:] != ordered[:-1], True)
    best = int(np.where(ends, f1, -1).argmax())
    return Threshold(float(ordered[best]), float(f1[best]))
