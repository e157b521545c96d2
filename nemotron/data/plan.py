"""What a whole run takes from each source, as a table: tokens, passes, and what is missing."""

import sys
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console
from rich.table import Table

from nemotron.console import PrintableConsole
from nemotron.data.loader import TrainingData
from nemotron.exit_codes import DONE, FAILED

FILE_WIDTH = 200
"""Characters of a line where there is no terminal to fit into."""


def wide_console() -> Console:
    """Return a console whose tables are not squeezed when the output goes to a file."""
    width = None if sys.stdout.isatty() else FILE_WIDTH
    return PrintableConsole(highlight=False, markup=False, width=width, soft_wrap=False)


@dataclass(frozen=True)
class SourcePlan:
    """What a run needs of one source and what there is."""

    name: str
    group: str
    available: int
    needed: tuple[int, ...]
    """Tokens in each phase."""
    epochs: float
    limit: float | None
    """Most passes that are allowed."""

    @property
    def shortfall(self) -> int:
        """Tokens that would have to be added to stay within the limit."""
        if self.limit is None or self.epochs <= self.limit:
            return 0
        return round(sum(self.needed) / self.limit) - self.available


def plan_sources(data: TrainingData) -> list[SourcePlan]:
    """Work out the tokens of every source in every phase, without going through the run."""
    timeline = data.timeline
    read = [data.tokens_read(step) for step in timeline.first_steps]
    epochs = data.epochs(timeline.num_steps)
    groups = {leaf.source.name: leaf.group or "" for leaf in timeline.leaves}
    return [
        SourcePlan(
            name,
            groups[name],
            tokens.train.num_tokens,
            tuple(after[name] - before[name] for before, after in pairwise(read)),
            epochs[name],
            data.limit_of(name),
        )
        for name, tokens in data.tokens.items()
    ]


def print_plan(data: TrainingData) -> int:
    """Print the plan; returns 1 when a source would be read more often than it may be."""
    console, timeline = wide_console(), data.timeline
    console.print(f"{timeline.num_steps:,} steps, {timeline.num_tokens:,} tokens")
    table = Table(box=None, pad_edge=False)
    table.add_column("source")
    table.add_column("group")
    for heading in ("tokens available", *(f"phase {phase.name}" for phase in timeline.phases)):
        table.add_column(heading, justify="right")
    for heading in ("share", "passes", "limit", "shortfall"):
        table.add_column(heading, justify="right")
    plans = plan_sources(data)
    for plan in plans:
        table.add_row(
            plan.name,
            plan.group,
            f"{plan.available:,}",
            *(f"{tokens:,}" for tokens in plan.needed),
            f"{sum(plan.needed) / max(1, timeline.num_tokens):.3%}",
            f"{plan.epochs:.2f}",
            "" if plan.limit is None else f"{plan.limit:g}",
            f"{plan.shortfall:,}" if plan.shortfall else "",
        )
    console.print(table)
    weight = sum(leaf.weight for leaf in timeline.phases[0].lengths[0].leaves)
    for gone in data.config.missing:
        console.print(
            f"missing: {gone.name}, {gone.weight:g} of {weight:g} weights in the original mixture; "
            "its share went to the others in proportion",
        )
    short = [plan.name for plan in plans if plan.shortfall]
    if short:
        console.print(
            f"too many passes over {', '.join(short)}: train for fewer tokens, lower the weight, "
            "add data or raise max_epochs"
        )
    return FAILED if short else DONE
