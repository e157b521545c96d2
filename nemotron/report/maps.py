"""The heat maps of a run: load and bias of its experts, errors of its number formats."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nemotron.drawing.heatmap import Cells, HeatMap, heat_map
from nemotron.drawing.series import Series
from nemotron.report.run import Run
from nemotron.report.table import Table, is_number

COLUMNS = 80
"""Stretches of a run over which the values of a cell are averaged."""
ROWS = 32
"""Operands that a map of a number format shows: those with the largest values."""
PRECISION = (
    ("error", "Relative error of quantized operands"),
    ("underflow", "Share of numbers that became zero"),
    ("saturation", "Share of numbers beyond the format's range"),
    ("dead", "Share of numbers in blocks without a scale"),
)


@dataclass(frozen=True)
class MapGroup:
    """Heat maps of a run about one thing."""

    name: str
    title: str
    run: str
    maps: list[tuple[str, HeatMap]]
    formats: list[tuple[str, str, str, int]] = field(default_factory=list)
    """Format, kind of layer, reason, and how many layers."""


@dataclass(frozen=True)
class Rows:
    """Named rows of cells over the steps of a run."""

    names: list[str]
    cells: Cells
    first: int
    last: int


def expert_maps(run: Run) -> list[MapGroup]:
    """Return the maps of a run with experts; none of other runs."""
    fullest = over_time(run.train, r"moe/(.+)/load_max_over_mean")
    low, high = (over_time(run.train, rf"moe/(.+)/bias_{end}") for end in ("min", "max"))
    unused = over_time(run.train, r"moe/(.+)/experts_unused")
    maps = [_over_time("Tokens of the fullest expert over the mean, by layer", fullest)]
    if low is not None and high is not None and low.names == high.names:
        spread = Rows(low.names, high.cells - low.cells, low.first, low.last)
        maps.append(_over_time("Spread of the router bias, by layer", spread))
    if unused is not None and np.nanmax(unused.cells, initial=0.0) > 0:
        maps.append(_over_time("Experts without a token, by layer", unused))
    maps += _snapshot(run)
    found = [one for one in maps if one is not None]
    return [MapGroup("experts", "Experts", run.label, found)] if found else []


def precision_maps(run: Run) -> list[MapGroup]:
    """Return the maps of a run that quantizes and observes it."""
    maps = []
    for figure, title in PRECISION:
        rows = over_time(run.train, rf"precision/(.+)/{figure}")
        if rows is not None and np.nanmax(rows.cells, initial=0.0) > 0:
            maps.append(_over_time(title, _largest(rows)))
    counts = Counter(
        (line.get("format", "?"), line.get("kind", "?"), line.get("reason", "?"))
        for line in run.formats
    )
    formats = [(*map(str, line), number) for line, number in counts.most_common()]
    found = [one for one in maps if one is not None]
    if not found and not formats:
        return []
    return [MapGroup("precision", "Number formats", run.label, found, formats)]  # type: ignore[arg-type]


def brief(layer: str) -> str:
    """Return the name of a layer without what all of them have in common."""
    return layer.removeprefix("layers.").replace("mtp.layers.", "mtp.").replace(".mixer", "")


def over_time(table: Table, pattern: str, columns: int = COLUMNS) -> Rows | None:
    """Return the means of the keys that fit over stretches of the steps; None if none fits."""
    found = {}
    for key in table.keys:
        if (match := re.fullmatch(pattern, key)) is not None:
            found[match[1]] = table.series(key).finite
    found = {name: series for name, series in found.items() if len(series.x)}
    if not found:
        return None
    first = min(series.x.min() for series in found.values())
    last = max(series.x.max() for series in found.values())
    longest = max(len(series.x) for series in found.values())
    columns = min(columns, longest)
    cells = [_means(series, first, last, columns) for series in found.values()]
    return Rows([*found], np.stack(cells), int(first), int(last))


def _means(series: Series, first: float, last: float, columns: int) -> Cells:
    place = (series.x - first) / ((last - first) or 1.0) * columns
    place = np.minimum(place, columns - 1).astype(np.int64)
    count = np.bincount(place, minlength=columns)
    total = np.bincount(place, series.y, columns)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _over_time(title: str, rows: Rows | None) -> tuple[str, HeatMap] | None:
    if rows is None:
        return None
    drawn = heat_map(
        [brief(name) for name in rows.names],
        rows.cells,
        title=title,
        left=f"step {rows.first:,}",
        right=f"step {rows.last:,}",
    )
    return None if drawn is None else (title, drawn)


def _largest(rows: Rows) -> Rows:
    """Return the rows with the largest values, in their order."""
    if len(rows.names) <= ROWS:
        return rows
    highest = np.nanmax(np.where(np.isnan(rows.cells), -np.inf, rows.cells), axis=1)
    kept = np.sort(np.argsort(-highest)[:ROWS])
    return Rows([rows.names[i] for i in kept], rows.cells[kept], rows.first, rows.last)


def _snapshot(run: Run) -> list[tuple[str, HeatMap] | None]:
    """Return load and bias of every expert at one step, each layer sorted by load."""
    step, layers = run.experts.get("step"), run.experts.get("layers")
    if not isinstance(layers, dict) or not isinstance(step, int) or step > run.step:
        return []  # of steps that were undone
    names, loads, biases = [], [], []
    for name, table in layers.items():
        load = _numbers(table, "load")
        if load is None or not load.sum():
            continue
        order = np.argsort(-load, kind="stable")
        bias = _numbers(table, "bias")
        known = bias is not None and len(bias) == len(load)
        names.append(brief(str(name)))
        loads.append((load / load.mean())[order])
        biases.append(bias[order] if known and bias is not None else np.full(len(load), np.nan))
    if not names or len({len(load) for load in loads}) > 1:
        return []
    at = f"of every expert at step {step:,}"
    return [
        _by_expert(f"Load {at}, over the mean", names, loads, None),
        _by_expert(f"Router bias {at}", names, biases, 0.0),
    ]


def _by_expert(
    title: str, names: Sequence[str], rows: Sequence[Cells], middle: float | None
) -> tuple[str, HeatMap] | None:
    drawn = heat_map(
        names,
        np.stack(rows),
        title=title,
        left="most tokens",
        right="fewest",
        middle=middle,
    )
    return None if drawn is None else (title, drawn)


def _numbers(table: object, key: str) -> Cells | None:
    values = table.get(key) if isinstance(table, dict) else None
    if not isinstance(values, list) or not values or not all(map(is_number, values)):
        return None
    return np.array(values, np.float64)
