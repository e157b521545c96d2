"""What was measured, as cells of a table and as a drawing."""

from collections.abc import Mapping, Sequence

from nemotron.drawing.bars import Bar, bar_chart
from nemotron.drawing.colors import standalone
from nemotron.sol.machine import Machine
from nemotron.sol.run import Result

HEADS = ("problem", "backend", "ms", "bound", "binds", "of bound", "score", "reference", "separate")

Scores = Mapping[tuple[str, str, str], float]
"""By problem, size and dtype."""


def place(result: Result) -> tuple[str, str, str]:
    """Return under what a score is kept."""
    c = result.candidate
    return c.name, c.size, c.dtype


def cells(result: Result) -> list[str]:
    """Return a row below `HEADS`; times are milliseconds, forward and backward."""
    times = (result.least.seconds, result.beside_both, result.separate)
    least, reference, separate = (_ms(seconds) for seconds in times)
    share, mark = f"{result.of_bound:.0%}", f"{result.score:.2f}"
    name, backend = result.candidate.name, result.candidate.backend
    head = [name, backend, _ms(result.both), least, result.least.binds, share, mark]
    if result.beside != "reference":
        reference = f"{reference} ({result.beside})"
    return [*head, reference, separate]


def roofs_line(machine: Machine) -> str:
    """Return the rates that a device reaches, on one line."""
    peaks = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in machine.peaks.items())
    return f"{peaks}, copy {machine.bandwidth / 1e9:,.1f} GB/s"


def drawing(results: Sequence[Result], title: str, before: Scores) -> str:
    """Return a bar of each score as a file of SVG; lines across them are scores of before."""
    bars = [
        Bar(f"{r.candidate.name} {r.candidate.dtype}", r.score, before.get(place(r)))
        for r in results
    ]
    chart = bar_chart(bars, title=title)
    legend = {"score: 0.5 is the reference, 1 the bound": "h6"}
    return standalone(chart.svg, chart.height, title, legend)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"
