"""Results on long texts over their length and the depth of what is sought."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemotron.drawing.colors import standalone
from nemotron.drawing.heatmap import LEVELS, heat_map
from nemotron.files import write_text
from nemotron.posttrain.environments.long_tasks import NEEDLES
from nemotron.posttrain.suites.definition import SuiteTask
from nemotron.posttrain.suites.results import Result

Grid = list[list[float | None]]


@dataclass(frozen=True)
class Ruler:
    """Mean rewards; None where nothing was judged."""

    lengths: list[int]
    depths: list[float]
    needles: Grid
    """Mean over the kinds of needles: a row for each depth, a column for each length."""
    by_kind: dict[str, Grid]
    """The same for each kind of needle."""
    others: dict[str, list[float | None]]
    """Tasks without a depth, for each length."""

    def as_json(self) -> dict[str, Any]:
        """Return the tables as JSON."""
        return dict(vars(self))

    def draw(self, path: Path) -> None:
        """Write the needles as a heat map, SVG; nothing if none was judged."""
        cells = np.array(self.needles, np.float64)  # None becomes NaN
        title = "Needles found, by depth and length in tokens"
        drawing = heat_map(
            [f"depth {depth:g}" for depth in self.depths],
            cells,
            title=title,
            left=f"{self.lengths[0]:,} tokens",
            right=f"{self.lengths[-1]:,}" if len(self.lengths) > 1 else "",
            limits=(0.0, 1.0),
        )
        if drawing is not None:
            legend = {"none (0)": "h0", f"all ({drawing.high})": f"h{LEVELS - 1}"}
            write_text(path, standalone(drawing.svg, drawing.height, title, legend))


def collect(tasks: Sequence[SuiteTask], results: Sequence[Result]) -> Ruler | None:
    """Return the tables of tasks that `ruler_tasks` made; None if there are none."""
    tasks = [task for task in tasks if "tokens" in task.options]
    if not tasks:
        return None
    rewards = {result.task: result.reward for result in results}
    lengths = sorted({task.options["tokens"] for task in tasks})
    depths = sorted({d for task in tasks if (d := task.options["depth"]) is not None})

    def find(kind: str, length: int, depth: float | None) -> float | None:
        for task in tasks:
            where = (task.options["kinds"][0], task.options["tokens"], task.options["depth"])
            if where == (kind, length, depth):
                return rewards.get(task.name)
        return None

    by_kind = {k: [[find(k, n, d) for n in lengths] for d in depths] for k in NEEDLES}
    kinds = dict.fromkeys(task.options["kinds"][0] for task in tasks)
    others = {k: [find(k, n, None) for n in lengths] for k in kinds if k not in NEEDLES}
    needles = [
        [_mean([grid[row][column] for grid in by_kind.values()]) for column in range(len(lengths))]
        for row in range(len(depths))
    ]
    return Ruler(lengths, depths, needles, by_kind, others)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
