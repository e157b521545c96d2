"""`nemotron report`: reads runs, writes the page, and repeats this while runs train."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron.errors import UserError
from nemotron.exit_codes import DONE
from nemotron.files import write_text
from nemotron.outputs import check_place
from nemotron.report.page import HEAD, render
from nemotron.report.run import Run, read_runs
from nemotron.terminal import print_text, say

NAME = "report.html"


@dataclass(frozen=True)
class Prompts:
    """What the checkpoints of runs are asked to continue."""

    texts: tuple[str, ...] = ()
    max_new_tokens: int = 48


def report(
    paths: Sequence[Path],
    out: Path | None = None,
    *,
    every: float | None = None,
    prompts: Prompts = Prompts(),
) -> int:
    """Write the page; with `every`, again after so many seconds until no run is running.

    Raises:
        UserError: when a run is not there, or the page cannot be written to `out`.
    """
    runs = read_runs(list(paths))
    if out is None:
        out = runs[0].files.path / NAME if len(runs) == 1 else Path(NAME)
    _check(out)
    size = _write(runs, out, prompts, every)
    for run in runs:
        for problem in run.problems:
            say(f"warning: {run.label}: {problem}")
    print_text(f"{out}: {size:,} bytes")
    try:
        while every is not None and any(run.status.is_running for run in runs):
            time.sleep(every)
            runs = read_runs(list(paths))
            _write(runs, out, prompts, every)
    except KeyboardInterrupt:
        _write(runs, out, prompts, None)  # a page that nobody writes must not be read again
        raise
    return DONE


def _write(runs: Sequence[Run], out: Path, prompts: Prompts, every: float | None) -> int:
    if prompts.texts:
        from nemotron.report.generated import add_samples

        for run in runs:
            add_samples(run, prompts.texts, prompts.max_new_tokens)
    is_running = any(run.status.is_running for run in runs)
    page = render(runs, every if is_running else None)
    write_text(out, page)
    return len(page.encode())


def _check(out: Path) -> None:
    """Check, before any drawing, that the page may stand there.

    Raises:
        UserError: when there is no such folder, or something that is not a report.
    """
    if not out.parent.is_dir():
        rule = f"lies in {out.parent}, which is not a folder; create it, or name another."
        raise UserError(rule, key="--out", value=out)
    check_place(out, "--out")
    if out.is_symlink() or (out.exists() and not out.is_file()):
        rule = "is a folder, a link or a device; give the name of a file."
        raise UserError(rule, key="--out", value=out)
    if not os.path.exists(out):
        return
    with open(out, "rb") as file:
        if file.read(len(HEAD)) != HEAD.encode():
            rule = "is not a report, so it is kept; give another name."
            raise UserError(rule, key="--out", value=out)
