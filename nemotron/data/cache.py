"""The folder of a cache: made by one process at a time, each entry whole or not at all."""

import shutil
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nemotron.errors import UserError
from nemotron.files import FULL, locked, sync_folder, why_unwritable


@contextmanager
def held_cache(cache: Path) -> Iterator[None]:
    """Lock a cache; wait while another process holds it.

    Raises:
        UserError: when it cannot be written.
    """
    try:
        with locked(cache / ".lock"):
            yield
    except OSError as error:
        raise _unwritable(cache, error) from error


def make_writable(cache: Path) -> None:
    """Make the cache folder, and find out now whether it can be written.

    Raises:
        UserError: when it cannot.
    """
    check_place(cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / ".lock").touch()
    except OSError as error:
        raise _unwritable(cache, error) from error


def check_place(cache: Path) -> None:
    """Check, without writing, that the cache may be written to or made.

    Raises:
        UserError: when it may not.
    """
    if (error := why_unwritable(cache)) is not None:
        raise _unwritable(cache, error)


def _unwritable(cache: Path, error: OSError) -> UserError:
    advice = "make room there, or name another" if error.errno in FULL else "name a writable"
    rule = f"cannot be written: {error.strerror or error}; {advice} folder."
    return UserError(rule, key="data.cache", value=cache.absolute(), because=error)


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


def map_array(path: Path, dtype: DTypeLike) -> NDArray[Any]:  # Any: of `dtype`
    """Return a stored array of one dimension, of which only what is used is read.

    Raises:
        ValueError: when the file is damaged, or holds anything else.
        OSError: when there is no such file.
    """
    if not path.is_file():  # no pipe and no device is opened
        raise FileNotFoundError(f"{path} is not a file")
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r")
    except (tokenize.TokenError, SyntaxError, EOFError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if array.ndim != 1 or array.dtype != dtype:
        raise ValueError(f"{path} holds {array.ndim} dimensions of {array.dtype}")
    return array
