"""The edit distance of Levenshtein, of tokens or of the letters of a sound."""

from collections.abc import Sequence


def count_edits(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the least number of items to insert, remove or replace."""
    previous = list(range(len(other) + 1))
    for row, item in enumerate(one, 1):
        current = [row]
        for column, mate in enumerate(other, 1):
            replaced = previous[column - 1] + (item != mate)
            current.append(min(replaced, previous[column] + 1, current[-1] + 1))
        previous = current
    return previous[-1]
