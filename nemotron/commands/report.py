"""Commands that look at runs: a page, a list, a comparison."""

from pathlib import Path
from typing import Annotated

import typer

from nemotron.commands.shared import CommandGroup, refuse_without
from nemotron.limits import MOST_TOKENS

app = CommandGroup()

RUN = "Folder of a run."
EVERY, NEW_TOKENS = 10.0, 48


@app.command(epilog="Example: nemotron report runs/tiny")
def report(
    runs: Annotated[
        list[Path], typer.Argument(help=f"{RUN} Several are drawn together.", metavar="RUN...")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="HTML file to write; default: report.html in the folder of the run, of several "
            "runs in the current folder."
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="Write it again and again until no run is running."),
    ] = False,
    every: Annotated[float, typer.Option(min=1, help="With --watch: seconds between two.")] = EVERY,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text that the kept checkpoints continue on the page; repeatable."),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=1, max=MOST_TOKENS, help="With --prompt: largest number of tokens to add."
        ),
    ] = NEW_TOKENS,
) -> int:
    """Write what runs did as one HTML file, which needs no other."""
    from nemotron.report.command import Prompts
    from nemotron.report.command import report as run

    if not watch:
        refuse_without("--watch", {"every": every}, {"every": EVERY})
    if not prompt:
        given = {"max_new_tokens": max_new_tokens}
        refuse_without("--prompt", given, {"max_new_tokens": NEW_TOKENS})
    return run(
        runs,
        out,
        every=every if watch else None,
        prompts=Prompts(tuple(prompt or ()), max_new_tokens),
    )


@app.command(epilog="Example: nemotron runs")
def runs(
    folder: Annotated[
        Path, typer.Argument(help="Folder of runs, or one run.", metavar="FOLDER")
    ] = Path("runs"),
) -> int:
    """List runs with their state, step and best validation."""
    from nemotron.report.compare import list_runs

    return list_runs(folder)


@app.command(epilog="Example: nemotron compare runs/tiny runs/mine")
def compare(
    one: Annotated[Path, typer.Argument(help=RUN, metavar="RUN")],
    others: Annotated[
        list[Path], typer.Argument(help="Runs to compare it with.", metavar="RUN...")
    ],
) -> int:
    """Print results and settings of runs beside each other."""
    from nemotron.report.compare import compare as run

    return run([one, *others])
