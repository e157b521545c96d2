"""`nemotron doctor --bench`: the roofs of this machine, and how near operations come to them."""

import sys

import torch
from rich.box import SIMPLE
from rich.table import Table

from nemotron.console import LOG_WIDTH, PrintableConsole
from nemotron.device import find_device
from nemotron.exit_codes import DONE, FAILED
from nemotron.sol.machine import Machine, machine_file, probe, write
from nemotron.sol.report import HEADS, cells, roofs_line
from nemotron.sol.run import NoFigure, Patience, candidates, measure

SIZE = {"cpu": "nano-proxy", "cuda": "nano"}
PATIENCE = Patience(20.0)


def bench(size: str | None = None, patience: Patience = PATIENCE) -> int:
    """Measure the backend that each operation of a training step gets; returns the exit code.

    A backend whose results are wrong, or which beats its bound, makes the exit code 1.
    """
    console = PrintableConsole(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False)
    device = find_device("auto")
    size = size or SIZE[device.type]
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    machine = write(probe(device), machine_file(device))
    threads = f", {machine.threads} threads" if device.type == "cpu" else ""
    roofs = f"{machine.device}{threads}: {roofs_line(machine)}"
    console.print(roofs, markup=False, soft_wrap=True)
    table, missing = _measure(size, dtype, device, machine, patience)
    console.print(table)
    for line in missing:
        console.print(line, markup=False, soft_wrap=True)
    return FAILED if missing else DONE


def _measure(
    size: str, dtype: str, device: torch.device, machine: Machine, patience: Patience
) -> tuple[Table, list[str]]:
    """Return the table, and a sentence for each problem that gave no figure."""
    title = (
        f"Operations at the size of {size} in {dtype}: milliseconds of forward and backward\n"
        "score: 1 at the bound, 0.5 at the time of the readable reference"
    )
    table = Table(*HEADS, title=title, title_justify="left", box=SIMPLE)
    missing = []
    for candidate in candidates(size, dtype, device):
        try:
            table.add_row(*cells(measure(candidate, machine, patience)))
        except NoFigure as problem:
            missing.append(f"{candidate.name}, {candidate.backend}: no figure: {problem}")
    return table, missing
