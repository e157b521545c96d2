"""The report as one HTML file: what is drawn and written of runs, in the template beside."""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from nemotron.checkpoint.manifest import code_version
from nemotron.drawing.chart import Line, Mark, line_chart
from nemotron.drawing.colors import COLORS
from nemotron.drawing.heatmap import HeatMap
from nemotron.report.figures import (
    GROUPS,
    VALIDATION,
    Figure,
    Group,
    Key,
    claim,
    left_over,
    union,
)
from nemotron.report.maps import MapGroup, expert_maps, precision_maps
from nemotron.report.provenance import describe_starts
from nemotron.report.run import Run
from nemotron.report.summary import SMOOTHED, differences, progress, rows
from nemotron.terminal import printable

HEAD = "<!doctype html>\n<!-- written by nemotron report -->\n"
"""How every report begins, so that it may be replaced by a newer one."""
LINES = 8
"""Lines of a chart, as many as there are colors."""
OTHER_CHARTS = 24
LONGEST = 400
"""Characters of a setting in a table."""


@dataclass(frozen=True)
class Chart:
    """A drawing with the names of its lines."""

    title: str
    svg: str
    lines: list[Line]
    unit: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page with drawings."""

    name: str
    title: str
    charts: list[Chart] = field(default_factory=list)
    maps: list[tuple[str, HeatMap]] = field(default_factory=list)
    note: str = ""


class Drawing:
    """Draws figures of runs on one x axis: steps, or tokens if batches differ in size."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs
        sizes = {run.recipe.get("batch.global_tokens") for run in runs}
        self._by_tokens = len(sizes) > 1
        self.x_label = "tokens" if self._by_tokens else "step"
        kinds = {"train": [run.train for run in runs], VALIDATION: [r.validation for r in runs]}
        self._tables = kinds
        self._keys = {kind: union(t.keys for t in tables) for kind, tables in kinds.items()}

    def sections(self) -> list[Section]:
        """Return the sections that have something to show."""
        found = [self._section(group) for group in GROUPS]
        left = left_over(self._keys)
        charts = [c for key in left[:OTHER_CHARTS] for c in self._charts(_alone(key), [key])]
        more = ", ".join(key.name for key in left[OTHER_CHARTS:])
        note = f"Not drawn: {more}." if more else ""
        return [
            one
            for one in (*found, Section("other", "Other figures", charts, note=note))
            if one.charts
        ]

    def _section(self, group: Group) -> Section:
        charts = []
        for figure in group.figures:
            charts += self._charts(figure, claim(figure, self._keys))
        return Section(group.name, group.title, charts)

    def _charts(self, figure: Figure, keys: Sequence[Key]) -> list[Chart]:
        if len(self._runs) == 1:
            number = -(-len(keys) // LINES)
            parts = [keys[i::number] for i in range(number)]
            found = [self._one_run(figure, part) for part in parts]
        else:
            found = [self._overlay(figure, key, len(keys) > 1) for key in keys]
        return [chart for chart in found if chart.svg]

    def _one_run(self, figure: Figure, keys: Sequence[Key]) -> Chart:
        lines = [self._line(0, key, key.label, color) for color, key in enumerate(keys)]
        marks = self._marks(self._runs[0]) if figure.has_marks else []
        return self._chart(figure, figure.title, lines, marks)

    def _overlay(self, figure: Figure, key: Key, is_one_of_many: bool) -> Chart:
        lines = [
            self._line(number, key, run.label, number)
            for number, run in enumerate(self._runs)
            if len(self._tables[key.kind][number].series(key.name).y)
        ]
        title = f"{figure.title}: {key.label}" if is_one_of_many else figure.title
        return self._chart(figure, title, lines, [])

    def _line(self, run: int, key: Key, label: str, color: int) -> Line:
        series = self._tables[key.kind][run].series(key.name, by_tokens=self._by_tokens)
        return Line(label, series, color, has_dots=key.kind == VALIDATION)

    def _chart(self, figure: Figure, title: str, lines: list[Line], marks: Sequence[Mark]) -> Chart:
        svg = line_chart(lines, title=title, x_label=self.x_label, scale=figure.scale, marks=marks)
        return Chart(title, svg, lines, figure.unit)

    def _marks(self, run: Run) -> list[Mark]:
        return [
            Mark(event.step, f"step {event.step}: {event.text}", event.kind) for event in run.events
        ]


def _alone(key: Key) -> Figure:
    return Figure(key.name, (), scale="auto")


def render(runs: Sequence[Run], refresh_s: float | None = None) -> str:
    """Return the page; with `refresh_s`, a browser reads it again after so many seconds."""
    maps: list[MapGroup] = []
    for run in runs:
        maps += [*expert_maps(run), *precision_maps(run)]
    return HEAD + _template().render(
        colors=COLORS,
        runs=runs,
        is_one=len(runs) == 1,
        title=", ".join(run.label for run in runs),
        refresh_s=refresh_s,
        version=code_version(),
        time=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        rows=rows(runs),
        smoothed=SMOOTHED,
        progress=progress,
        differences=differences(runs) if len(runs) > 1 else [],
        sections=Drawing(runs).sections(),
        map_groups=maps,
        starts=[describe_starts(run) for run in runs],
    )


@cache
def _template() -> Template:
    """Return the template, which escapes every text that is put into it."""
    environment = Environment(
        loader=PackageLoader("nemotron.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters["cut"] = _cut
    return environment.get_template("page.html.jinja")


def _shown(value: Any) -> Any:  # Any: whatever a template holds
    """Return text as escapes where a browser would obey it, such as marks that reorder a line."""
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    return printable(value) if is_text else value


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
