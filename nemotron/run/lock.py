"""Holding the folder of a run, so that no other process writes to it."""

import contextlib
import datetime
import fcntl
import json
import os
import platform
from pathlib import Path
from typing import NoReturn

from nemotron.errors import UserError
from nemotron.files import UNSUPPORTED, open_regular, read_regular, try_lock

LOCK = "lock"


class FolderLock:
    """Locks a folder and a file in it, which says who holds them.

    The lock of the folder cannot be deleted, and the one of the file holds where folders cannot be
    locked. Both end with the process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOCK
        self._folder_descriptor = self._descriptor = -1

    def check(self) -> None:
        """Raise UserError when another process holds the folder; nothing is written."""
        if self.is_held_elsewhere():
            self._refuse()

    def is_held_elsewhere(self) -> bool:
        """Say whether another process holds the folder; nothing is written."""
        own = os.O_NOFOLLOW | os.O_NONBLOCK
        for path, flags in ((self.folder, os.O_DIRECTORY), (self.path, own)):
            try:
                descriptor = os.open(path, os.O_RDONLY | flags)
            except OSError:  # nobody made it, or `acquire` says why it cannot be used
                continue
            try:
                if not _is_free(descriptor):
                    return True
            finally:
                os.close(descriptor)
        return False

    def acquire(self) -> None:
        """Hold the folder, which exists.

        Raises:
            UserError: when another process was faster, or the lock is not a regular file.
            OSError: when it cannot be written.
        """
        self._folder_descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        if not _is_free(self._folder_descriptor):
            self._refuse()
        try:
            self._descriptor = open_regular(self.path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if self.path.exists() or self.path.is_symlink():
                raise UserError(f"{error.strerror}; remove it.", where=str(self.path)) from None
            raise
        if not try_lock(self._descriptor, self.path):
            self._refuse()
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        holder = {"host": platform.node(), "pid": os.getpid(), "since": now}
        with contextlib.suppress(OSError):  # it only serves the sentence to others
            os.truncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    @property
    def place(self) -> Path:
        """The folder that was locked, wherever it is now."""
        return Path(f"/proc/self/fd/{self._folder_descriptor}")

    def is_held(self) -> bool:
        """Say whether the folder that was locked still has its name; else, whether there is one."""
        if self._folder_descriptor < 0:
            return self.folder.is_dir()
        try:
            now, held = os.stat(self.folder), os.fstat(self._folder_descriptor)
        except OSError:
            return False
        return (now.st_dev, now.st_ino) == (held.st_dev, held.st_ino)

    def release(self) -> None:
        """Let others have the folder."""
        for descriptor in (self._descriptor, self._folder_descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._folder_descriptor = self._descriptor = -1

    def _refuse(self) -> NoReturn:
        self.release()
        try:
            holder = json.loads(read_regular(self.path))
            who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (OSError, UserError, ValueError, KeyError, TypeError, RecursionError):
            who = "another process"
        raise UserError(
            f"is in use by {who}; wait for it, stop it, or give this run another name.",
            where=str(self.folder),
        )


def _is_free(descriptor: int) -> bool:
    """Lock what is open unless another process does; also True where that cannot be locked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    return True
