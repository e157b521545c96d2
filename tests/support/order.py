"""The order in which workers get files: what waits runs beside what computes."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

BESIDE = 8
"""Files that compute between two that wait: of four workers, about one waits."""


def in_order(items: Iterable[pytest.Item]) -> dict[Path, int]:
    """Return the place of each file.

    Long files begin first, so that no worker is left alone with one at the end. Files marked
    `waits` are spread among the others, the longest first: together they would leave cores idle.
    """
    ranks: dict[Path, int] = {}
    waits: dict[Path, float] = {}
    for item in items:
        rank = 0 if item.get_closest_marker("distributed") else 2 - is_long(item)
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
        if marker := item.get_closest_marker("waits"):
            waits[item.path] = marker.args[0]
    computing = sorted((path for path in ranks if path not in waits), key=ranks.__getitem__)
    waiting = sorted(waits, key=waits.__getitem__, reverse=True)
    return {path: place for place, path in enumerate(_spread(waiting, computing))}


def is_long(item: pytest.Item) -> bool:
    """Say whether daily work leaves a test out."""
    return any(item.get_closest_marker(name) for name in ("distributed", "slow"))


def _spread(few: list[Path], many: list[Path]) -> Iterator[Path]:
    for number, path in enumerate(few):
        yield path
        yield from many[number * BESIDE : (number + 1) * BESIDE]
    yield from many[len(few) * BESIDE :]
