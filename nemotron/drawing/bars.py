"""Bars as SVG: a number between 0 and 1 for each name, and one to compare it with."""

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron.drawing.chart import number, text

WIDTH, RIGHT, TOP, BOTTOM = 400, 34, 4, 20
LETTER = 5.4
"""Width of a letter of a name."""
ROW, THICK = 15.0, 9.0
TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Bar:
    """A bar, and what it was before if that is known."""

    name: str
    value: float
    before: float | None = None


@dataclass(frozen=True)
class Bars:
    """A drawing, `WIDTH` wide."""

    svg: str
    height: float


def bar_chart(bars: Sequence[Bar], *, title: str) -> Bars:
    """Draw bars below each other; a line across a bar says what it was before."""
    left = 12 + LETTER * max(len(bar.name) for bar in bars)
    bottom = TOP + ROW * len(bars)
    span = WIDTH - RIGHT - left
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {number(bottom + BOTTOM)}" role="img" '
        f'aria-label="{text(title)}">'
    ]
    for tick in TICKS:
        x = number(left + tick * span)
        parts.append(f'<path class="g" d="M{x} {TOP}V{number(bottom)}"/>')
        parts.append(f'<text x="{x}" y="{number(bottom + 14)}" class="m">{tick:g}</text>')
    for place, bar in enumerate(bars):
        parts += _draw(bar, TOP + place * ROW, left, span)
    return Bars("".join(parts) + "</svg>", bottom + BOTTOM)


def _draw(bar: Bar, top: float, left: float, span: float) -> list[str]:
    begin, middle = number(top + (ROW - THICK) / 2), number(top + ROW / 2)
    length = span * min(max(bar.value, 0.0), 1.0)
    found = [
        f'<text x="{number(left - 5)}" y="{middle}" dy=".32em" class="e s">{text(bar.name)}</text>',
        f'<rect class="h6" x="{number(left)}" y="{begin}" width="{number(length)}" '
        f'height="{number(THICK)}"/>',
        f'<text x="{number(left + length + 4)}" y="{middle}" dy=".32em" class="s">'
        f"{bar.value:.2f}</text>",
    ]
    if bar.before is not None:
        x = number(left + span * min(max(bar.before, 0.0), 1.0))
        found.append(f'<path class="a" d="M{x} {number(top)}v{number(ROW)}"/>')
    return found
