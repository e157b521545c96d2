"""Fit the constants of the time model to the published rows that are not held out."""

from collections.abc import Sequence
from itertools import product

import numpy as np

from nemotron.plan.published import ROWS, Published
from nemotron.plan.throughput import Constants, predict, terms


def calibration_rows() -> list[Published]:
    """Return the rows that the constants are fitted to."""
    return [row for row in ROWS if not row.held_out]


LEAST = np.array([1.25, 0.0, 0.0, 0.0])
"""No constant is below this: products stay under 80 % of the peak, no time is negative."""


def fit(rows: Sequence[Published]) -> Constants:
    """Return the constants with the least squares of relative errors in the step's time.

    The time is a sum of terms that are known up to a factor each, so this is linear; which factors
    lie at their limit is tried out.
    """
    matrix = np.array([_shares(row) for row in rows])
    best, least = LEAST, np.inf
    for choice in product((False, True), repeat=len(LEAST)):
        free = np.array(choice)
        found = LEAST.copy()
        rest = 1 - matrix[:, ~free] @ LEAST[~free]
        found[free] = np.linalg.lstsq(matrix[:, free], rest, rcond=None)[0]
        error = float(np.square(matrix @ found - 1).sum())
        if (found >= LEAST).all() and error < least:
            best, least = found, error
    return Constants(*map(float, best))


def _shares(row: Published) -> list[float]:
    """Return each term as a share of the measured step, the bubble left out."""
    job = row.job
    step = job.rows * job.seq_len / (row.tokens_per_second * job.dims.world)
    busy = step * (1 - predict(job).bubble)
    return [term / busy for term in terms(job)]


def error(row: Published, constants: Constants) -> float:
    """Return the relative error of the predicted tokens per second."""
    return predict(row.job, constants).per_accelerator / row.tokens_per_second - 1
