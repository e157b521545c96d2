"""The folder of checkpoints: temporary names, what a killed save left, and the newest few.

Nothing is removed but checkpoints and folders with these temporary names, which nothing else would
choose. What cannot be removed stays, and a note says so.
"""

import os
import secrets
import shutil
from pathlib import Path

from nemotron.checkpoint.find import SAVING
from nemotron.checkpoint.manifest import DamagedCheckpoint, folder_name, steps, verify

REMOVING = ".nemotron-removing-"


def new_partial(folder: Path, step: int) -> Path:
    """Create a folder in which a checkpoint is written before it gets its name."""
    partial = folder / f"{SAVING}{folder_name(step)}-{secrets.token_hex(4)}"
    partial.mkdir()
    return partial


def discard(path: Path) -> str | None:
    """Remove a checkpoint; returns a note when something of it stays under another name.

    It is renamed first: a half-removed folder must not look like a damaged checkpoint.

    Raises:
        OSError: when it cannot be renamed; it is as it was.
    """
    aside = path.with_name(f"{REMOVING}{path.name}-{secrets.token_hex(4)}")
    path.rename(aside)
    return _remove(aside)


def remove_leftovers(folder: Path) -> list[str]:
    """Remove what killed saves and removals left behind; returns notes on what stays."""
    found = [path for start in (SAVING, REMOVING) for path in sorted(folder.glob(f"{start}step-*"))]
    return [note for path in found if (note := _remove(path))]


def prune(folder: Path, keep: int) -> list[str]:
    """Remove whole checkpoints beyond the newest `keep`; returns notes on those that stay.

    Damaged ones stay for inspection.
    """
    notes, kept = [], 0
    for step in steps(folder):
        path = folder / folder_name(step)
        try:
            verify(path, content=False)
        except DamagedCheckpoint:
            continue
        kept += 1
        if kept > keep and (note := _prune(path)):
            notes.append(note)
    return notes


def set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, so that its step can be saved again."""
    names = (f"{path.name}.damaged{number}" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    path.rename(next(new for name in names if not (new := path.with_name(name)).exists()))


def _prune(path: Path) -> str | None:
    # a folder whose content cannot change would lose its name and nothing else
    if not os.access(path, os.W_OK | os.X_OK):
        return f"{path} is an older checkpoint, but it is read-only; it stays"
    try:
        return discard(path)
    except OSError as error:
        return (
            f"{path} is an older checkpoint, but it cannot be removed ({error.strerror or error})"
        )


def _remove(path: Path) -> str | None:
    try:
        shutil.rmtree(path)
    except OSError as error:
        return f"{path} cannot be removed ({error.strerror or error}); remove it by hand"
    return None
