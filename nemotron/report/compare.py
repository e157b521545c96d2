"""What `nemotron compare` and `nemotron runs` print."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.report.run import read_briefly, read_runs
from nemotron.report.summary import Row, best_validation, differences, last_loss, progress, rows
from nemotron.run.files import RunFiles
from nemotron.run.status import is_run
from nemotron.terminal import one_line, print_text, say

DEEPEST = 4
"""Folders below the one that is searched for runs."""
LONGEST = 60
"""Characters of a setting in the comparison."""


def compare(paths: Sequence[Path]) -> int:
    """Print results and settings of runs beside each other.

    Raises:
        UserError: when one is not there.
    """
    runs = read_runs(list(paths))
    for run in runs:
        for problem in run.problems:
            say(f"warning: {run.label}: {problem}")
    table = [["", *(run.label for run in runs)]]
    table.append(["state", *(_cut(run.status.sentence) for run in runs)])
    table.append(["step", *(progress(run) for run in runs)])
    for row in rows(runs):
        table.append([row.name, *(text or "-" for text in row.texts), *_change(row)])
    _print(table)
    settings = differences(runs)
    if not settings:
        print_text("\nthe recipes are the same")
        return DONE
    print_text("\nrecipe")
    _print([[key, *(_cut(value) for value in values)] for key, values in settings])
    return DONE


def list_runs(folder: Path) -> int:
    """Print a line for each run in a folder, the one that was written last first.

    The folder may be a run itself, or something in one.

    Raises:
        UserError: when there is no such folder.
    """
    if not folder.is_dir():
        raise UserError("is not a folder; give the one that holds your runs.", where=str(folder))
    found = sorted(_find(folder, 0), key=_written, reverse=True)
    if not found and (outer := _around(folder)):
        folder, found = outer.path, [outer]
    if not found:
        print_text(f"no runs in {folder}")
        return DONE
    table = [["run", "state", "step", "loss", "best validation", "written"]]
    for files in found:
        run = read_briefly(files)
        loss = last_loss(run.train)
        table.append(
            [
                os.path.relpath(files.path, folder) if files.path != folder else str(folder),
                _cut(run.status.sentence),
                progress(run),
                "-" if loss is None else f"{loss:.4f}",
                str(best_validation(run.validation) or "-"),
                _ago(time.time() - _written(files)),
            ]
        )
    _print(table)
    return DONE


def _find(folder: Path, depth: int) -> Iterator[RunFiles]:
    """Yield the runs at or below a folder; links are not followed."""
    try:
        if is_run(files := RunFiles(folder)):
            yield files
            return
        inner = sorted(Path(entry.path) for entry in os.scandir(folder) if _is_folder(entry))
    except OSError:  # another user's folder below the one that was named
        return
    if depth == DEEPEST:
        return
    for path in inner:
        yield from _find(path, depth + 1)


def _around(folder: Path) -> RunFiles | None:
    """Return the run in which a folder lies, if there is one."""
    outer = (RunFiles(path) for path in folder.absolute().parents[:2])
    return next((files for files in outer if is_run(files)), None)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")


def _written(files: RunFiles) -> float:
    """Return when the run last wrote something, in seconds since 1970."""
    times = []
    for path in (files.metrics, files.status, files.path):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return times[0] if times else 0.0


def _ago(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def _change(row: Row) -> list[str]:
    """Return how far the second of two values is from the first."""
    if len(row.values) != 2:
        return []
    first, second = row.values
    if first is None or second is None:
        return []
    if first == second:
        return ["same"]
    share = f" ({(second - first) / abs(first):+.1%})" if first else ""
    return [f"{second - first:+{row.form}}{share}"]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _print(table: Sequence[Sequence[str]]) -> None:
    """Print rows of cells in aligned columns."""
    cells = [[one_line(cell) for cell in row] for row in table]
    columns = max(map(len, cells))
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(columns)]
    for row in cells:
        print("  ".join(f"{cell:<{widths[i]}}" for i, cell in enumerate(row)).rstrip())
