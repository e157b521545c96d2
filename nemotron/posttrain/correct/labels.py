"""The one token, or none, that is true at each column of several aligned candidates."""

import numpy as np
from numpy.typing import NDArray

from nemotron.data.correct.pairs import PairRow

AGREES, SAME = 1, 1
"""What it is worth that a candidate has a target token at a column, and that it is the same."""


def column_labels(row: PairRow, void: int) -> NDArray[np.int64]:
    """Return the true token of each column, `void` where the target has none.

    The candidates say by their durations where each target token belongs; of all ways to put
    target tokens into columns in order, at most one in each, that is taken with which most
    candidates agree, those with the same token twice. Tokens without a column are left out.
    """
    value = _values(row)
    tokens, columns = value.shape
    best = np.zeros((tokens + 1, columns + 1), np.int64)
    for token in range(tokens):
        # a token goes to some column up to here: the best of the diagonal steps so far
        taken = np.where(value[token] > 0, best[token, :-1] + value[token], 0)
        best[token + 1, 1:] = np.maximum(np.maximum.accumulate(taken), best[token, 1:])
    labels = np.full(columns, void, np.int64)
    token, column = tokens, columns
    while token and column:
        if best[token, column] == best[token - 1, column]:
            token -= 1
        elif best[token, column] == best[token, column - 1]:
            column -= 1
        else:
            token, column = token - 1, column - 1
            labels[column] = row.target[token]
    return labels


def _values(row: PairRow) -> NDArray[np.int64]:
    """Return for each target token and column what the candidates make it worth."""
    value = np.zeros((len(row.target), row.num_columns), np.int64)
    for ids, durations in zip(row.columns, row.durations, strict=True):
        column = np.repeat(np.arange(row.num_columns), durations)
        token = np.arange(len(column))
        value[token, column] += AGREES + SAME * (ids[column] == row.target[token])
    return value
