"""A file of lines that a full disk does not stop: what it refuses is kept and written later."""

import contextlib
import os
from collections import deque
from pathlib import Path

from nemotron.errors import UserError
from nemotron.files import open_regular, sync_descriptor


class AppendedFile:
    """Appends lines; while the file system refuses them, they stay here in their order."""

    def __init__(self, path: Path) -> None:
        """Look at the file; the first line opens or creates it.

        Raises:
            UserError: when it is a link, a pipe or a device.
        """
        self.path = path
        self._descriptor = -1
        self._kept: deque[bytes] = deque()
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise UserError("is a link, or not a regular file; move it away.", where=str(path))

    def write(self, line: bytes) -> None:
        """Append a line; it is in the file when this returns, or kept."""
        self._kept.append(line)
        self.catch_up()

    def catch_up(self) -> OSError | None:
        """Write what is kept; returns why the file system still refuses it, if it does."""
        if not self._kept:
            return None
        try:
            if self._descriptor < 0:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._descriptor = open_regular(self.path, flags)
            size = os.fstat(self._descriptor).st_size
            while self._kept:
                self._append(self._kept[0], size)
                size += len(self._kept.popleft())
        except OSError as error:
            return error
        return None

    def sync(self) -> OSError | None:
        """Put the lines onto the disk; returns why that was refused, if it was."""
        if (problem := self.catch_up()) is not None:
            return problem
        try:
            if self._descriptor >= 0:
                sync_descriptor(self._descriptor)
        except OSError as error:
            return error
        return None

    def take_kept(self) -> list[bytes]:
        """Return the lines that are not in the file, which from now on are the caller's."""
        lines = list(self._kept)
        self._kept.clear()
        return lines

    def close(self) -> None:
        """Close the file, after a last attempt."""
        self.catch_up()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, line: bytes, size: int) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # half a line would hide the next one
                os.ftruncate(self._descriptor, size)
            raise
