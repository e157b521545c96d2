"""The folder of a cache: made by one process at a time, each entry whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemotron.errors import UserError
from nemotron.files import FULL, locked, sync_folder


@contextmanager
def held_cache(cache: Path) -> Iterator[None]:
    """Hold a cache, waiting for whoever holds it.

    Raises:
        UserError: when it cannot be written.
    """
    try:
        with locked(cache / ".lock"):
            yield
    except OSError as error:
        room = "make room there, or " if error.errno in FULL else ""
        raise UserError(
            f"cannot be written: {error.strerror or error}; {room}name another folder.",
            key="data.cache",
            value=cache,
        ) from error


@contextmanager
def new_entry(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill, which then replaces the entry; the caller holds the cache."""
    part = folder.with_suffix(".tmp")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)  # of a full disk it would take the room
        raise
    if folder.is_symlink():  # a rehearsal sees entries of another cache by links
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    sync_folder(folder.parent)
