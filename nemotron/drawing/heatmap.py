"""Heat maps as SVG: one path for each level of color, so that thousands of cells stay small."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemotron.drawing.chart import number, text
from nemotron.drawing.scale import short

WIDTH, RIGHT, TOP, BOTTOM = 400, 8, 4, 20
LETTER, LONGEST = 5.4, 26
"""Width of a letter of a name, and letters of the longest one that is not cut."""
LEVELS = 9
ROW, FEW_ROWS = 14.0, 96.0
"""Height of a row that has room, and of all rows where they are few."""
TALLEST = 420.0
LABELS = 32
"""Rows that are named; of more, every second, third and so on."""
COLUMNS = 128

Cells = NDArray[np.float64]


@dataclass(frozen=True)
class HeatMap:
    """A drawing, and what its colors mean."""

    svg: str
    low: str
    high: str
    palette: str
    """`h` from little to much, `v` from below to above a middle."""
    height: float
    """Of the drawing, which is `WIDTH` wide."""


def heat_map(
    rows: Sequence[str],
    cells: Cells,
    *,
    title: str,
    left: str,
    right: str,
    middle: float | None = None,
    limits: tuple[float, float] | None = None,
) -> HeatMap | None:
    """Draw a matrix, in which NaN is a gap; None when all of it is.

    `left` and `right` stand below the first and the last column. With `middle`, the colors say how
    far above or below it a value is. `limits` are the values of the first and the last color, if
    not the smallest and the largest ones.
    """
    cells = fewer_columns(cells)
    known = cells[np.isfinite(cells)]
    if not known.size:
        return None
    low, high = float(known.min()), float(known.max())
    if limits is not None:
        low, high = limits
    elif middle is not None:
        reach = max(high - middle, middle - low)
        low, high = middle - reach, middle + reach
    span = high - low or 1.0
    height = min(max(ROW, FEW_ROWS / len(rows)), TALLEST / len(rows), 2 * ROW)
    bottom = TOP + height * len(rows)
    names = [name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}" for name in rows]
    start = 12 + LETTER * max(map(len, names))
    palette = "h" if middle is None else "v"
    levels = np.full(cells.shape, -1)
    finite = np.isfinite(cells)
    levels[finite] = np.clip((cells[finite] - low) / span * LEVELS, 0, LEVELS - 1).astype(int)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {number(bottom + BOTTOM)}" role="img" '
        f'aria-label="{text(f"{title}: {short(low)} to {short(high)}")}">',
        *_labels(names, start, height),
        *(_cells(levels, level, start, height, palette) for level in range(LEVELS)),
        f'<text x="{number(start)}" y="{number(bottom + 14)}">{text(left)}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{number(bottom + 14)}" class="e">{text(right)}</text></svg>',
    ]
    return HeatMap("".join(parts), short(low), short(high), palette, bottom + BOTTOM)


def fewer_columns(cells: Cells, most: int = COLUMNS) -> Cells:
    """Return the means of neighboring columns, so that there are at most so many."""
    if cells.shape[1] <= most:
        return cells
    groups = np.array_split(cells, most, axis=1)
    return np.stack([_mean(group) for group in groups], axis=1)


def _mean(group: Cells) -> Cells:
    known = np.isfinite(group)
    count = known.sum(1)
    total = np.where(known, group, 0.0).sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _labels(rows: Sequence[str], start: float, height: float) -> list[str]:
    every = -(-len(rows) // LABELS)
    x = number(start - 5)
    return [
        f'<text x="{x}" y="{number(TOP + (i + 0.5) * height)}" dy=".32em" class="e s">'
        f"{text(name)}</text>"
        for i, name in enumerate(rows)
        if i % every == 0
    ]


def _cells(levels: NDArray[np.int64], level: int, left: float, height: float, palette: str) -> str:
    """Return the cells of one level: neighbors in a row are one rectangle."""
    width = (WIDTH - left - RIGHT) / levels.shape[1]
    shapes = []
    for row, found in enumerate(levels == level):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], found.astype(np.int8), [0]])))
        for start, end in edges.reshape(-1, 2).tolist():
            corner = f"M{number(left + start * width)} {number(TOP + row * height)}"
            size = number((end - start) * width + 0.2)
            shapes.append(f"{corner}h{size}v{number(height)}h-{size}z")
    return f'<path class="{palette}{level}" d="{"".join(shapes)}"/>' if shapes else ""
