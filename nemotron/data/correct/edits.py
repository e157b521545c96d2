"""Edits between texts: how many, and which ones a correction made."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron.data.correct.align import Alignment, Columns, Token


@dataclass(frozen=True)
class Change:
    """Tokens of a source that are replaced; none, where tokens are inserted."""

    start: int
    stop: int
    tokens: tuple[str, ...]


def changes(alignment: Alignment, source: Sequence[str], text: Sequence[str]) -> list[Change]:
    """Return what changes a source into a text; neighboring edits are one change."""
    found: list[Change] = []
    at = 0
    is_open = False
    for i, j in alignment.pairs:
        kept = i is not None and j is not None and source[i] == text[j]
        stop = at if i is None else i + 1
        if not kept:
            new = () if j is None else (text[j],)
            if is_open:
                last = found.pop()
                found.append(Change(last.start, stop, (*last.tokens, *new)))
            else:
                found.append(Change(at, stop, new))
        is_open, at = not kept, stop
    return found


def touched(alignment: Alignment, source: Sequence[str], text: Sequence[str]) -> set[int]:
    """Return the positions of source tokens that a text lacks or replaces.

    An inserted token counts for the source token on its right, or for the end.
    """
    places: set[int] = set()
    at = 0
    for i, j in alignment.pairs:
        if i is None:
            places.add(at)
            continue
        if j is None or source[i] != text[j]:
            places.add(i)
        at = i + 1
    return places


def least_edits_of_columns(columns: Columns[Token], target: Sequence[Token]) -> int:
    """Return the edits of the best text that takes one candidate's token of each column."""
    previous = list(range(len(target) + 1))
    for column in zip(*columns.lines, strict=True):
        tokens, skipped = set(column), 0 if None in column else 1
        current = [previous[0] + skipped]
        for place, token in enumerate(target, 1):
            paired = previous[place - 1] + (token not in tokens)
            current.append(min(paired, previous[place] + skipped, current[-1] + 1))
        previous = current
    return previous[-1]


def vote(columns: Columns[Token]) -> list[Token]:
    """Return the text that most candidates have in each column; of equals the earlier candidate."""
    best = [max(column, key=column.count) for column in zip(*columns.lines, strict=True)]
    return [token for token in best if token is not None]
