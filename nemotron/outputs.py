"""Folders that a command writes whole, and replaces only if it wrote all that is in them.

A mark inside the folder names the command and every file that it wrote. The rule holds for finished
folders, for what a killed command left behind, and for every clean-up.
"""

import errno
import glob
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nemotron.errors import UserError
from nemotron.files import (
    FULL,
    is_unfinished,
    read_regular,
    sync_folder,
    why_unwritable,
    write_json,
)
from nemotron.section import Section

log = logging.getLogger(__name__)

MARK = ".nemotron.json"
LARGEST_MARK = 1 << 26
"""Bytes; a larger file of that name is not ours."""


class Mark(Section):
    """Who wrote a folder, and the size in bytes of each file; no files while it is unfinished."""

    made_by: str
    files: dict[str, int] | None = None


def output_folder(path: str | Path) -> Path:
    """Return the folder that a user names, with a name of its own in place of `.` or `..`.

    Raises:
        UserError: for the root of the file system.
    """
    folder = Path(path)
    folder = folder.resolve() if folder.name in ("", "..") else folder
    if not folder.name:
        raise UserError("cannot be an output; give the name of a folder.", where=str(folder))
    return folder


def check_output(
    target: Path, made_by: str, inputs: Iterable[Path] = (), *, overwrite: bool
) -> None:
    """Check that a command may write a folder, before it does any work.

    Raises:
        UserError: when the folder is a file or a link, is or holds an input, or holds anything that
            the command did not write, or is there and may not be replaced, or has no place.
    """
    check_writable(target)
    if target.is_symlink():
        raise UserError("is a link; give the folder that it leads to.", where=str(target))
    if target.exists() and not target.is_dir():
        raise UserError("is a file; give the name of a folder.", where=str(target))
    refuse_inputs_inside(target, inputs)
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError("exists already; add --overwrite to replace it.", where=str(target))
    _own_mark(target, made_by)


def check_writable(target: Path) -> None:
    """Check, before any work, that a file or folder can be made where it is to lie.

    Raises:
        UserError: when its folder is a file or takes no other.
    """
    if (error := why_unwritable(target.parent)) is not None:
        raise unwritable(error, target, "nothing was written")


def check_new(path: Path, key: str) -> None:
    """Check, before any work, that a result may get this name, which no option lets it take over.

    Raises:
        UserError: naming the option `key`, when something has the name, or its folder is a file or
            takes no other.
    """
    if path.exists() or path.is_symlink():
        raise UserError("exists already; give a new name.", key=key, value=path)
    check_place(path, key)


def check_place(path: Path, key: str) -> None:
    """Check what `check_writable` does, for a name that an option gives.

    Raises:
        UserError: naming the option `key`, when its folder is a file or takes no other.
    """
    if (error := why_unwritable(path.parent)) is None:
        return
    if error.errno == errno.ENOTDIR:
        raise UserError("lies below a file; give another name.", key=key, value=path)
    rule = f"cannot be written: {error.strerror}; give a name in another folder."
    raise UserError(rule, key=key, value=path, because=error)


def refuse_inputs_inside(target: Path, inputs: Iterable[Path]) -> None:
    """Raise UserError when an input is the folder to write, or lies inside it."""
    home = target.resolve()
    for path in inputs:
        if path.resolve().is_relative_to(home):
            raise UserError(
                f"is an input and lies in {target}, the folder to write; "
                "choose another folder for the output.",
                where=str(path),
            )


def begin(folder: Path, made_by: str) -> bool:
    """Make a folder for unfinished output, or adopt the one that the same command left.

    Returns whether there was one. Its content is not looked at, only its mark.

    Raises:
        UserError: when there is something else.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError("is in the way of unfinished output; move it elsewhere.", where=str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    mark = _read_mark(folder)
    if mark is None and all(is_unfinished(path, MARK) for path in folder.iterdir()):
        for path in folder.iterdir():
            path.unlink()
        write_json(folder / MARK, Mark(made_by=made_by).model_dump())
        return False
    if mark is None or mark.made_by != made_by:
        raise UserError(
            f"was not left by an earlier {made_by}, so it is not touched; "
            "move it elsewhere, or choose another folder for the output.",
            where=str(folder),
        )
    return True


@contextmanager
def writing_beside(target: Path, made_by: str) -> Iterator[Path]:
    """Yield an empty folder beside the target, which is removed unless `publish` moves it.

    Raises:
        UserError: when the disk does not take what is written.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if begin(partial, made_by):
            _clear(partial)
        try:
            yield partial
        finally:
            with suppress(OSError):
                _clear(partial)
                shutil.rmtree(partial)
    except OSError as error:
        raise unwritable(error, target, "nothing was replaced") from error


def _clear(partial: Path) -> None:
    """Remove all but the mark, by which an interrupted removal is still known as ours."""
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MARK:
            path.unlink()


def publish(partial: Path, target: Path, made_by: str) -> None:
    """Rename the finished folder to the target, then remove the old target if it is ours.

    Raises:
        UserError: when the old target holds anything that the command did not write.
    """
    write_json(
        partial / MARK, Mark(made_by=made_by, files=dict(sorted(_sizes(partial)))).model_dump()
    )
    sync_folder(partial)
    check_output(target, made_by, overwrite=True)
    old = None
    if target.is_dir() and any(target.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    sync_folder(target.parent)
    for replaced in target.parent.glob(f".{glob.escape(target.name)}.old-*"):
        _remove_own(replaced, made_by)


def unwritable(error: OSError, folder: Path, kept: str) -> UserError:
    """Return the error for an output that cannot be written; `kept` says what is not lost."""
    named = "" if error.filename == str(folder) else f"{error.filename or 'a file'} "
    what = f"{named}cannot be written: {error.strerror or error}"
    full = error.errno in FULL
    advice = "free some space and run the same command again" if full else "choose another folder"
    return UserError(f"{what}; {advice}: {kept}.", where=str(folder), because=error)


def _own_mark(folder: Path, made_by: str, *, is_partly_removed: bool = False) -> Mark:
    """Return the mark of a finished folder in which there is nothing else.

    In one that is partly removed, folders may be empty.
    """
    mark = _read_mark(folder)
    if mark is None or mark.made_by != made_by or mark.files is None:
        raise UserError(
            f"has no {MARK} of nemotron {made_by}, so it is not replaced; "
            "choose another folder, or remove it yourself.",
            where=str(folder),
        )
    for name, size in _sizes(folder):
        if is_partly_removed and name.endswith("/") and not (folder / name).is_symlink():
            continue
        if mark.files.get(name) != size:
            what = "was changed since" if name in mark.files else f"is not of nemotron {made_by}"
            raise UserError(
                f"{what}, so {folder} is not replaced; move that file elsewhere.",
                where=str(folder / name),
            )
    return mark


def _read_mark(folder: Path) -> Mark | None:
    path = folder / MARK
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > LARGEST_MARK:
            return None
        return Mark.model_validate_json(read_regular(path))
    except (OSError, ValueError):
        return None


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield name and size of everything in a folder but its mark; folders only when empty."""
    for here, folders, files in os.walk(folder):
        for name in files:
            path = Path(here, name)
            if path != folder / MARK:
                yield str(path.relative_to(folder)), path.lstat().st_size
        for name in folders:
            path = Path(here, name)
            if path.is_symlink() or not any(path.iterdir()):
                yield f"{path.relative_to(folder)}/", 0


def remove_folder(folder: Path, names: Iterable[str]) -> None:
    """Remove these files of a folder, then the folder; what else is there stays, with a warning."""
    try:
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for here, _, _ in os.walk(folder, topdown=False):
            os.rmdir(here)
    except OSError as error:
        log.warning("%s is not needed any more, but could not be removed: %s", folder, error)


def _remove_own(folder: Path, made_by: str) -> None:
    """Remove a replaced folder file by file, so that nothing can go that came in meanwhile.

    One that an earlier command began to remove has folders that are empty by now, and at the end
    nothing else.
    """
    left = [name for name, _ in _sizes(folder)]
    if not any((folder / name).is_file() or (folder / name).is_symlink() for name in left):
        remove_folder(folder, [MARK])
        return
    try:
        files = _own_mark(folder, made_by, is_partly_removed=True).files or {}
    except UserError as error:
        log.warning("%s is what was replaced, and was not removed: %s", folder, error)
        return
    remove_folder(folder, [*(name for name in files if not name.endswith("/")), MARK])
