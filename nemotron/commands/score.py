"""The command that measures corrected text."""

from pathlib import Path
from typing import Annotated

import typer

from nemotron.commands.shared import CommandGroup

app = CommandGroup()


@app.command(epilog="Example: nemotron score fixed.jsonl --references pairs.jsonl")
def score(
    answers: Annotated[Path, typer.Argument(help="JSON lines that `nemotron correct` wrote.")],
    references: Annotated[Path, typer.Option(help="The pairs, with candidates and target.")],
    against: Annotated[
        Path | None, typer.Option(help="Answers of another way to correct, to set beside.")
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(help="Folder for SVG files: oracles, detection, time over length."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measures as JSON.")] = False,
) -> int:
    """Measure corrected text: error rates, precision and recall of edits, and oracles."""
    from nemotron.data.rewrite.score import score_file

    return score_file(answers, references, against=against, figures=figures, as_json=as_json)
