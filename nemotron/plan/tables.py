"""A report as tables: drawn in a terminal, plain aligned text in a pipe."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemotron.model.parameters import by_kind, count_parameters, kind_name
from nemotron.plan.calibration import error
from nemotron.plan.memory import GIB
from nemotron.plan.report import LayoutReport, Report
from nemotron.plan.search import Found
from nemotron.plan.throughput import FITTED, Constants
from nemotron.plan.trace import Kept


@dataclass(frozen=True)
class Grid:
    """A table with a title; the first column is text, the others are aligned right."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def show(grids: Sequence[Grid], console: Console) -> None:
    """Print the tables."""
    for grid in grids:
        if console.is_terminal:
            _draw(grid, console)
        else:
            for line in plain(grid):
                console.print(line, highlight=False, markup=False, soft_wrap=True)


def _draw(grid: Grid, console: Console) -> None:
    if grid.rows:
        table = Table(title=escape(grid.title), title_justify="left")
        for number, name in enumerate(grid.header):
            table.add_column(escape(name), justify="right" if number else "left")
        for row in grid.rows:
            table.add_row(*map(escape, row))
        console.print(table)
    else:
        console.print(f"[bold]{escape(grid.title)}[/bold]", highlight=False)
    for note in grid.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


def plain(grid: Grid) -> Iterator[str]:
    """Yield a table as lines of aligned text."""
    yield grid.title
    lines = [grid.header, *grid.rows] if grid.rows else []
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield ("  " + "  ".join(cells)).rstrip()
    for note in grid.notes:
        yield f"  {note}"
    yield ""


def grids_of(report: Report, constants: Constants) -> list[Grid]:
    """Return the tables of a report, from facts to estimates."""
    grids = [_parameters(report), _work(report)]
    if report.violations:
        notes = [str(found) for found in report.violations]
        grids.append(Grid("This layout is not valid", (), (), notes))
    if report.layout is not None:
        hardware = report.setting.hardware
        grids += [
            _memory(report.layout, hardware.memory),
            _traffic(report.layout),
            *_time(report, report.layout, constants),
        ]
    grids.append(_compared(report))
    if report.found is not None:
        grids.append(_found(report.found, report.setting.hardware.memory))
    if report.kept is not None:
        grids.append(_kept(report.kept))
    return grids


def _parameters(report: Report) -> Grid:
    model = report.setting.config.model
    count = count_parameters(model)
    rows = [(kind, f"{number:,}", _billions(number)) for kind, number in by_kind(model).items()]
    note = f"total {_billions(count.total)}, active {_billions(count.active)}"
    if model.mtp_pattern:
        note += ", multi-token prediction (mtp) apart"
    return Grid("Parameters", ("kind", "number", ""), rows, [note])


def _billions(count: float) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _work(report: Report) -> Grid:
    rows = []
    for length in dict.fromkeys(stretch.seq_len for stretch in report.setting.stretches):
        formats = dict(report.setting.formats[length])
        total = sum(formats.values())
        shares = ", ".join(f"{name} {100 * n / total:.0f} %" for name, n in formats.items())
        rows.append((f"rows of {length:,}", f"{total / 1e9:.4g} GFLOP", shares))
    title = "Work of one token, forward and backward"
    return Grid(title, ("", "FLOPs", "by format"), rows)


def _memory(layout: LayoutReport, limit: float) -> Grid:
    need = layout.memory
    rows = [
        (
            name + (" (largest)" if name == need.largest else ""),
            f"{value / GIB:.2f}",
            f"{100 * value / need.total:.0f} %",
        )
        for name, value in need.terms.items()
    ]
    rows.append(("sum", f"{need.total / GIB:.2f}", ""))
    verdict = "fits" if need.total <= limit else "DOES NOT FIT"
    where = "" if need.stage == "only" else f", {need.stage} stage"
    note = f"{verdict}: {need.total / 1e9:.1f} GB of {limit / 1e9:.0f} GB"
    return Grid(f"Memory of the fullest rank{where}", ("term", "GiB", ""), rows, [note])


def _traffic(layout: LayoutReport) -> Grid:
    rows = []
    for item in layout.traffic:
        rows.append(
            (
                item.name,
                f"{item.received / GIB:.2f}",
                f"{(item.received - item.slow) / GIB:.2f}",
                f"{item.slow / GIB:.2f}",
                f"{item.seconds(layout.prediction.job):.3f}",
                "beside" if item.hidden else "waited for",
            )
        )
    header = ("purpose", "GiB received", "fast link", "network", "s at nominal", "")
    notes = [] if rows else ["none"]
    return Grid("Traffic of one rank in a step", header, rows, notes)


def _time(report: Report, layout: LayoutReport, constants: Constants) -> list[Grid]:
    guess = layout.prediction
    dims = layout.dims
    rows = [(name, f"{value:.3f}") for name, value in guess.parts.items()]
    rows += [
        ("weights and gradients (overlapped)", f"{guess.beside:.3f}"),
        ("one step, including the bubble", f"{guess.step:.3f}"),
    ]
    sizes = " x ".join(
        f"{axis} {getattr(dims, axis)}" for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")
    )
    notes = [
        f"{sizes}, ep {dims.ep}; {guess.job.micro_batches} micro-batches of "
        f"{guess.job.micro_batch} on each rank; bubble {100 * guess.bubble:.1f} %",
        f"{guess.tokens_per_second:,.0f} tokens/s, {guess.per_accelerator:,.0f} on each; "
        f"{100 * guess.utilisation:.1f} % of the bf16 peak; most time: {guess.bound}",
        f"with {100 / constants.gemm:.0f} % of the peak in products, {constants.passes:.1f} "
        f"passes over the saved bytes, {constants.waiting:.2f} of the nominal communication time, "
        f"{constants.per_layer * 1e3:.2f} ms for each layer and micro-batch",
    ]
    if {"fp8", "fp4"} & dict(guess.job.formats).keys():
        notes.append("where no backend computes in the quantized formats, emulation is slower")
    spans = [
        (
            cost.phase,
            f"{cost.tokens:.4g}",
            f"{cost.days:,.2f}",
            f"{cost.accelerator_hours:,.0f}",
        )
        for cost in layout.costs
    ]
    system = report.setting.hardware.name
    return [
        Grid("Predicted time", ("part of a step", "s"), rows, notes),
        Grid(f"On {dims.world} x {system}", ("phase", "tokens", "days", "GPU hours"), spans),
    ]


def _compared(report: Report) -> Grid:
    row = report.compared
    note = (
        f"{row.title}: {row.tokens_per_second:,.0f} tokens/s on each published; this time "
        f"model is off by {100 * error(row, FITTED):+.0f} % there ({row.source})"
    )
    return Grid("Nearest published run", (), (), [note])


def _found(found: Found, limit: float) -> Grid:
    rows = [
        (
            candidate.overrides,
            f"{candidate.prediction.per_accelerator:,.0f}",
            f"{candidate.bytes / GIB:.1f}",
            f"{100 * candidate.prediction.bubble:.1f} %",
            candidate.prediction.bound,
        )
        for candidate in found.best
    ]
    notes = [f"{found.legal:,} valid layouts, {found.fitting:,} fit into {limit / 1e9:.0f} GB"]
    if not found.best:
        notes.append(f"the leanest needs {found.least_bytes / 1e9:.1f} GB; use more accelerators")
    header = ("layout", "tokens/s each", "GiB", "bubble", "most time")
    return Grid("Best layouts", header, rows, notes)


def _kept(kept: Sequence[Kept]) -> Grid:
    rows = [
        (kind_name(k.letter), f"{k.formula:,.0f}", f"{k.traced:,.0f}", f"{100 * k.error:+.2f} %")
        for k in kept
    ]
    header = ("block", "formula", "traced", "error")
    return Grid("Bytes saved for the backward pass, per token", header, rows)
