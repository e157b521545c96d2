"""How a run stands, as seen from outside: its folder, the state of its newest start, its JSON."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron.checkpoint.manifest import steps
from nemotron.errors import UserError
from nemotron.files import open_regular, parse_json
from nemotron.run.files import RunFiles
from nemotron.run.lock import FolderLock

MAX_BYTES = 1 << 26
"""Largest JSON file of a run that is read."""


@dataclass(frozen=True)
class RunStatus:
    """How the newest start of a run stands."""

    state: str
    """`running`, `done`, `stopped`, `failed`; `killed` if it said nothing; `imported`, `new`."""
    step: int | None = None
    exit_code: int | None = None
    reason: str | None = None
    """Why it was stopped or failed, if it said so."""

    @property
    def sentence(self) -> str:
        """The state, and what stopped the run."""
        return (
            f"stopped by {self.reason}" if self.state == "stopped" and self.reason else self.state
        )

    @property
    def is_running(self) -> bool:
        """Whether a process holds the folder."""
        return self.state == "running"


def is_run(files: RunFiles) -> bool:
    """Say whether a folder holds what only a run leaves, even if it did not do a step."""
    return files.metrics.is_file() or files.status.is_file() or bool(steps(files.checkpoints))


def find_run(path: Path) -> RunFiles:
    """Return the files of the run that is meant by its folder or by something in it.

    Raises:
        UserError: when there is none.
    """
    path = path.absolute()
    for folder in (path, path.parent, path.parent.parent):
        if is_run(files := RunFiles(folder)):
            return files
    if not path.exists():
        raise UserError(
            "does not exist; give the folder of a run, such as runs/tiny.", where=str(path)
        )
    raise UserError(
        "is not the folder of a run; give one that nemotron train wrote, such as "
        "runs/tiny, or list them with nemotron runs.",
        where=str(path),
    )


def read_status(files: RunFiles) -> RunStatus:
    """Return how a run stands; a start that ended without a word was killed.

    Raises:
        UserError: when `status.json` is damaged.
    """
    is_held = FolderLock(files.path).is_held_elsewhere()
    if not files.status.exists():
        known = "imported" if files.checkpoints.is_dir() else "new"
        return RunStatus("running" if is_held else known)
    content = read_json(files.status, dict)
    state, step = content.get("state"), content.get("step")
    code, reason = content.get("exit_code"), content.get("reason")
    if not isinstance(state, str) or not isinstance(step, int):
        raise UserError("is damaged: it has no state and step; remove it.", where=str(files.status))
    if is_held:
        state = "running"
    elif state == "running":
        state = "killed"
    if state not in ("stopped", "failed") or not isinstance(reason, str):
        reason = None
    return RunStatus(state, step, code if isinstance(code, int) else None, reason)


def read_json(path: Path, kind: type[dict] | type[list]) -> Any:  # Any: nested JSON
    """Return the content of a JSON file of a run, which is an object or a list.

    Raises:
        UserError: when it cannot be read, is too large, or is something else.
    """
    content = read_small(path)
    try:
        value = parse_json(content)
    except ValueError as error:
        raise UserError(
            f"is damaged: {error}; remove it, or restore it.", where=str(path)
        ) from None
    if not isinstance(value, kind):
        raise UserError(
            f"is damaged: it is not a JSON {kind.__name__}; remove it.", where=str(path)
        )
    return value


def read_small(path: Path) -> bytes:
    """Return the bytes of a regular file of a run.

    Raises:
        UserError: when it cannot be read or is too large.
    """
    try:
        with open(open_regular(path, os.O_RDONLY), "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        rule = f"cannot be read: {error.strerror}."
        raise UserError(rule, where=str(path), because=error) from None
    if len(content) > MAX_BYTES:
        raise UserError(
            f"is larger than {MAX_BYTES >> 20} MiB, so a run did not write it.", where=str(path)
        )
    return content
