"""AutoQuantize: the formats of all layers that lose least at a number of bits for each weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemotron.errors import UserError
from nemotron.precision.fixed_scales import BITS
from nemotron.precision.scales import StoredFormat
from nemotron.quantize.groups import Group
from nemotron.quantize.sensitivity import Scores
from nemotron.quantize.solver import Frontier, Option

POINTS = 200
"""Of the curve that a report holds; the frontier itself has up to millions."""


@dataclass(frozen=True)
class Point:
    """A choice that no other one beats."""

    bits: float
    """For each weight of the linear layers, on average."""
    score: float


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    chosen: Point
    table: Mapping[str, StoredFormat]
    """Format of each quantized layer."""
    groups: Mapping[str, str]
    """Format of each group."""
    curve: Sequence[Point]
    """The frontier, or points of it that are evenly spaced in bits."""


def search(groups: Sequence[Group], scores: Scores, bits: float) -> Found:
    """Return the formats with the smallest sum of scores whose weights take at most `bits`.

    Raises:
        UserError: when no choice is that small.
    """
    options = [
        [Option(group.cost(f), scores[group.name].get(f, 0.0)) for f in group.formats]
        for group in groups
    ]
    frontier = Frontier(options)
    unit = 2 * sum(group.weights for group in groups)
    # what a budget in decimals means must not depend on the last bit of a product
    place = frontier.within(int(np.floor(bits * unit + 1e-6)))
    if place is None:
        least = float(frontier.costs[0]) / unit
        raise UserError(
            f"is less than the smallest choice takes; give at least {least:.4g} "
            f"(bfloat16 has {BITS['bf16']:g}).",
            key="--bits",
            value=bits,
        )
    formats = [
        group.formats[option] for group, option in zip(groups, frontier.choice(place), strict=True)
    ]
    table: dict[str, StoredFormat] = {}
    for group, format in zip(groups, formats, strict=True):
        if format != "bf16":
            table |= group.table(format)
    names = {group.name: format for group, format in zip(groups, formats, strict=True)}
    return Found(_point(frontier, place, unit), table, names, _curve(frontier, unit))


def _point(frontier: Frontier, place: int, unit: int) -> Point:
    return Point(float(frontier.costs[place]) / unit, float(frontier.losses[place]))


def _curve(frontier: Frontier, unit: int) -> list[Point]:
    number = len(frontier.costs)
    places = range(number)
    if number > POINTS:
        wanted = np.linspace(frontier.costs[0], frontier.costs[-1], POINTS)
        found = np.searchsorted(frontier.costs, wanted, side="right") - 1
        places = sorted(set(found.tolist()))  # type: ignore[assignment]
    return [_point(frontier, place, unit) for place in places]
