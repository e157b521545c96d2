"""Which candidate is taken in each stretch in which candidates differ."""

import numpy as np
from numpy.typing import NDArray

AROUND = 2
"""Columns on both sides of a stretch whose scores count, too."""


def choose(columns: NDArray[np.int64], scores: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the candidate of each column; columns in which all agree have the first.

    In each stretch of columns that differ, the candidate with the highest sum of scores over the
    stretch and its surroundings is taken; among equals the first.
    Source: microsoft/NeuralSpeech: SoftCorrect/softcorrect/detect_error_token.py.
    """
    differs = (columns != columns[0]).any(0)
    chosen = np.zeros(columns.shape[1], np.int64)
    edges = np.flatnonzero(np.diff(np.pad(differs, 1).astype(np.int8)))
    for first, last in edges.reshape(-1, 2).tolist():
        around = slice(max(0, first - AROUND), last + AROUND)
        chosen[first:last] = scores[:, around].sum(1).argmax()
    return chosen
