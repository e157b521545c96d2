"""The curve of reward over the budget of reasoning."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemotron.drawing.chart import HEIGHT, Line, line_chart
from nemotron.drawing.colors import standalone
from nemotron.drawing.series import Series
from nemotron.files import write_text
from nemotron.posttrain.suites.results import Result

TITLE = "Mean reward over the budget of reasoning"


def write_curve(results: Sequence[Result], path: Path) -> None:
    """Write an SVG file with a line for each task, and its standard error as a band."""
    lines = [
        _line(name, place, [r for r in results if r.task == name and r.reward is not None])
        for place, name in enumerate(dict.fromkeys(result.task for result in results))
    ]
    svg = line_chart(lines, title=TITLE, x_label="tokens")
    legend = {line.label: f"c{line.color % 8}" for line in lines}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, standalone(svg or "<svg ></svg>", HEIGHT, TITLE, legend))


def _line(name: str, color: int, own: Sequence[Result]) -> Line:
    own = sorted(own, key=lambda result: result.budget or 0)
    budgets = np.array([result.budget or 0 for result in own], np.float64)
    rewards = np.array([result.reward for result in own], np.float64)
    errors = np.array([result.error or 0.0 for result in own], np.float64)
    return Line(name, Series(budgets, rewards), color, has_dots=True, errors=errors)
