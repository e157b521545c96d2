"""Draw the mean reward of several runs over their steps, of sampled and of held-out answers.

    python tools/draw_rewards.py rewards.svg runs/arith-rl runs/arith-rl-2

Prints of each run its first and last rewards, and which share of its steps each phase took.
"""

import argparse
from pathlib import Path

from nemotron.drawing.chart import HEIGHT, Line, line_chart
from nemotron.drawing.colors import standalone
from nemotron.drawing.series import Series
from nemotron.files import write_text
from nemotron.report.table import Table
from nemotron.run.files import RunFiles
from nemotron.run.metrics import MetricsReader

TITLE = "Mean reward: sampled answers, and likeliest ones to held-out tasks (dots)"
LAST = 20
"""Steps at the end over which rewards are averaged."""
PHASES = ("rl/rollout_s", "rl/verify_s", "rl/score_s", "perf/forward_backward_s")


def main() -> None:
    """Read the runs, print their figures and write the drawing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="SVG file to write")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    given = parser.parse_args()
    lines: list[Line] = []
    for color, folder in enumerate(given.runs):
        trained, checked = (table_of(folder, kind) for kind in ("train", "validation"))
        sampled = trained.series("rl/reward").finite
        lines.append(Line(folder.name, sampled, color))
        held = checked.series("validation/reward").finite
        lines.append(Line(f"{folder.name}, held out", held, color, has_dots=True))
        print(folder.name, summary(sampled, held), shares(trained), sep="; ")
    legend = {line.label: f"c{line.color % 8}" for line in lines if not line.has_dots}
    svg = line_chart(lines, title=TITLE, x_label="step")
    write_text(given.out, standalone(svg, HEIGHT, TITLE, legend))


def table_of(folder: Path, kind: str) -> Table:
    """Return the records of a kind of a run."""
    table = Table()
    for record in MetricsReader(RunFiles(folder).metrics, [kind]):
        table.add(record)
    return table


def summary(sampled: Series, held: Series) -> str:
    """Return rewards at both ends of a run; those of held-out tasks begin at the first check."""
    first, last = sampled.y[0], sampled.y[-LAST:].mean()
    checked = f"{held.y[0]:.3f} -> {held.y[-1]:.3f}" if len(held.y) else "none"
    return f"{len(sampled.y)} steps, sampled {first:.3f} -> {last:.3f}, held out {checked}"


def shares(trained: Table) -> str:
    """Return which share of the steps each phase took."""
    whole, *parts = (trained.series(key).finite.y.sum() for key in ("perf/step_s", *PHASES))
    named = ", ".join(
        f"{key.partition('/')[2].removesuffix('_s')} {value / whole:.0%}"
        for key, value in zip(PHASES, parts, strict=True)
    )
    return f"{named} of {whole:.0f} s"


if __name__ == "__main__":
    main()
