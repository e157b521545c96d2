"""Line charts as SVG: at most so many points a line, however long the run was."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from nemotron.drawing.scale import Axis, axis, short
from nemotron.drawing.series import Numbers, Series
from nemotron.terminal import printable

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24
BINS = 200
"""Points of a line; of more values, each point is the mean of its stretch, with a band."""
MARKS = 200
"""Vertical lines of a chart."""
LARGEST = 1e300
"""Values beyond are drawn here, so that sums stay finite."""


@dataclass(frozen=True)
class Line:
    """A series with its name and the number of its color."""

    label: str
    series: Series
    color: int
    has_dots: bool = False
    """Whether each value is a dot: for values that are far apart."""
    errors: Numbers | None = None
    """Of each value, drawn as a band around the line; such a line is not thinned out."""

    @property
    def last(self) -> str:
        """The newest finite value."""
        values = self.series.finite.y
        return short(float(values[-1])) if len(values) else "none"

    @property
    def num_lost(self) -> int:
        """Values that were not finite."""
        return int((~np.isfinite(self.series.y)).sum())


@dataclass(frozen=True)
class Mark:
    """A vertical line with its meaning."""

    x: float
    text: str
    kind: str


@dataclass(frozen=True)
class Binned:
    """Means, smallest and largest values of the stretches of a series."""

    x: Numbers
    mean: Numbers
    low: Numbers
    high: Numbers


def downsample(series: Series, bins: int = BINS) -> Binned:
    """Return a point for each stretch of the x axis in which a series has a finite value."""
    x, y = series.finite.x, np.clip(series.finite.y, -LARGEST, LARGEST)
    if len(x) <= bins:
        return Binned(x, y, y, y)
    span = x.max() - x.min() or 1.0
    place = np.minimum((x - x.min()) / span * bins, bins - 1).astype(np.int64)
    count = np.bincount(place, minlength=bins).astype(np.float64)
    low, high = np.full(bins, np.inf), np.full(bins, -np.inf)
    np.minimum.at(low, place, y)
    np.maximum.at(high, place, y)
    known = count > 0
    # divided first: the sum of a stretch could be too large
    x_mean, mean = (np.bincount(place, values / count[place], bins) for values in (x, y))
    centers, means = x_mean[known].astype(np.float64), mean[known].astype(np.float64)
    return Binned(centers, means, low[known], high[known])


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    scale: str = "linear",
    marks: Sequence[Mark] = (),
) -> str:
    """Return the drawing; empty when no line has a finite value."""
    binned = [_binned(line) for line in lines]
    x = np.concatenate([part.x for part in binned] or [np.empty(0)])
    if not len(x):
        return ""
    y = np.concatenate([part for one in binned for part in (one.low, one.high)])
    across = axis(x, LEFT, WIDTH - RIGHT, "exact")
    up = axis(y, HEIGHT - BOTTOM, TOP, scale)
    shown = ", ".join(f"{line.label} {line.last}" for line in lines)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(f"{title}: {shown}")}">',
        *_grid(across, up, x_label),
        *(_mark(mark, across) for mark in marks[:MARKS] if across.low <= mark.x <= across.high),
    ]
    for line, points in zip(lines, binned, strict=True):
        parts += _draw(line, points, across, up)
    return "".join([*parts, "</svg>"])


def _binned(line: Line) -> Binned:
    if line.errors is None:
        return downsample(line.series)
    x, y = line.series.x, line.series.y
    return Binned(x, y, y - line.errors, y + line.errors)


def text(value: str) -> str:
    """Return text as markup that shows it, in a place for text or in an attribute."""
    return escape(printable(value))


def number(value: float) -> str:
    """Return a coordinate."""
    return f"{value:.1f}".removesuffix(".0")


def points_of(x: Numbers, y: Numbers) -> str:
    """Return the points of a path."""
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    return "L".join(f"{number(a)} {number(b)}" for a, b in pairs)


def _grid(across: Axis, up: Axis, x_label: str) -> list[str]:
    parts = []
    for tick in up.ticks(3):
        y = number(float(up.place(np.array(tick))))
        parts.append(f'<path class="g" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y}" dy=".32em" class="e">{short(tick)}</text>')
    ticks = across.ticks(4)
    for tick in ticks:
        x = float(across.place(np.array(tick)))
        if x > WIDTH - RIGHT - 45:
            continue  # the name of the axis stands there
        parts.append(f'<text x="{number(x)}" y="{HEIGHT - 8}" class="m">{short(tick)}</text>')
    parts.append(
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" class="e">{text(x_label)}</text>'
        f'<path class="a" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
    )
    return parts


def _mark(mark: Mark, across: Axis) -> str:
    x = number(float(across.place(np.array(mark.x))))
    return (
        f'<path class="k k-{mark.kind}" d="M{x} {TOP}V{HEIGHT - BOTTOM}">'
        f"<title>{text(mark.text)}</title></path>"
    )


def _draw(line: Line, points: Binned, across: Axis, up: Axis) -> list[str]:
    if not len(points.x):
        return []
    x, y = across.place(points.x), up.place(points.mean)
    color = f"c{line.color % 8}"
    parts = []
    if not np.array_equal(points.low, points.high):
        low, high = up.place(points.low), up.place(points.high)
        around = points_of(np.append(x, x[::-1]), np.append(high, low[::-1]))
        parts.append(f'<path class="b {color}" d="M{around}Z"/>')
    name = f"<title>{text(line.label)}: {line.last}</title>"
    if len(x) > 1:
        parts.append(f'<path class="l {color}" d="M{points_of(x, y)}">{name}</path>')
    if len(x) == 1 or (line.has_dots and len(x) <= BINS // 2):
        dots = "".join(f"M{number(a)} {number(b)}h0" for a, b in zip(x, y, strict=True))
        parts.append(f'<path class="d {color}" d="{dots}">{name}</path>')
    return parts
