"""A folder that is written under a temporary name and renamed when it is finished."""

import shutil
from pathlib import Path

from nemotron.errors import UserError
from nemotron.files import sync_folder


def refuse_taken(target: Path, mark: str, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it may be replaced and holds `mark`.

    Raises:
        UserError: saying what would help.
    """
    if target.is_file():
        raise UserError(f"{target} is a file; give the name of a folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target} exists already; add --overwrite to replace it.")
    if not (target / mark).exists():
        raise UserError(f"{target} has no {mark}, so it is not replaced; choose another folder.")


def fresh_beside(target: Path) -> Path:
    """Return an empty folder beside the target; remove what a killed start left there."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    return partial


def publish(partial: Path, target: Path) -> None:
    """Rename the finished folder to the target, then remove the old target."""
    sync_folder(partial)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)
