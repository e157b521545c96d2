"""Writing files so that a reader, or a crash, never sees half of one; hashing and locking them."""

import errno
import fcntl
import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from nemotron.errors import UserError

UNSUPPORTED = {errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
"""What a file system answers that does not offer an operation at all."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk, a quota or a limit on the size of files answers when there is no room."""
NO_FILE_OF_OURS = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENODEV)
"""What `open_regular` answers to a path at which no file of ours is or can be."""

LARGEST_SMALL_FILE = 1 << 28
"""Bytes of a file that is read whole, such as a configuration, an index or a tokenizer."""

log = logging.getLogger(__name__)


def sync(file: BinaryIO) -> None:
    """Put what was written to an open file onto the disk."""
    file.flush()
    sync_descriptor(file.fileno())


def sync_descriptor(descriptor: int) -> None:
    """Put an open file or folder onto the disk, on a file system that can promise it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut, on a file system that can promise it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # of a folder that may be written to, but not listed
        return
    try:
        sync_descriptor(descriptor)
    except PermissionError:  # some network file systems
        return
    finally:
        os.close(descriptor)


def why_unwritable(folder: Path) -> OSError | None:
    """Return what writing to a folder, or making it, would raise now; None when it may be."""
    places = (folder.absolute(), *folder.absolute().parents)
    there = next(place for place in places if os.path.exists(place))
    by_effective = os.access in os.supports_effective_ids  # those that a write is judged by
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK, effective_ids=by_effective):
        return None
    is_fixed = os.statvfs(there).f_flag & os.ST_RDONLY
    refusal = errno.EROFS if is_fixed else errno.EACCES
    code = refusal if there.is_dir() else errno.ENOTDIR
    return OSError(code, os.strerror(code), str(there))


def open_regular(path: Path, flags: int) -> int:
    """Open a file of our own, which is neither a link nor a pipe nor a device, or create it.

    Raises:
        OSError: with ELOOP when it is a link, with ENODEV when it is not a regular file.
    """
    # a pipe that nobody reads would block the call
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.ENXIO, "", str(path))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link", str(path)) from None
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENODEV, "it is not a regular file", str(path)) from None
        raise
    return descriptor


def read_regular(path: Path, most: int = LARGEST_SMALL_FILE) -> bytes:
    """Return the content of a file that others may have put there; a link may lead to it.

    Raises:
        OSError: when it cannot be opened.
        UserError: when it is a folder, a pipe or a device, or has more than `most` bytes.
    """
    # a pipe that nobody writes would block the call
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UserError("is not a regular file; put the file itself there.", where=str(path))
        if found.st_size > most:
            raise UserError(
                f"has {found.st_size} bytes; a file of this kind has at most {most}.",
                where=str(path),
            )
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:  # as of files in /proc
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def read_text_file(path: Path) -> str:
    """Return the UTF-8 text of a file that a user names, without its byte order mark.

    Raises:
        UserError: when it is absent, no regular file, too large, or not UTF-8.
    """
    try:
        return read_regular(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text; give it in that encoding.", where=str(path)) from None
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise UserError(
            f"cannot be read: {error.strerror}; give a file of text.", where=str(path)
        ) from None


def open_lines(path: Path) -> BinaryIO:
    """Open a file of our own to read its lines and append others, or create it.

    Raises:
        UserError: when it has no place, or is a folder, a link, a pipe or a device.
    """
    try:
        return open(open_regular(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "a+b")
    except OSError as error:
        if error.errno not in NO_FILE_OF_OURS:
            raise
        raise UserError(
            f"cannot be written: {error.strerror}; name a file in a folder that exists.",
            where=str(path),
        ) from None


def write_bytes(path: Path, content: bytes) -> None:
    """Replace or create `path`: a reader finds the old content or all of the new one.

    Raises:
        OSError: naming `path`, when the file system refuses.
    """
    refuse_device(path)
    with naming(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with open(descriptor, "wb") as file:
                # mkstemp makes the file private; give it the rights that open() would have given.
                os.fchmod(file.fileno(), 0o666 & ~_umask())
                file.write(content)
                sync(file)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def refuse_device(path: Path) -> None:
    """Refuse to put a file in the place of a device, a pipe or a socket, or of a link to one.

    Raises:
        OSError: when it is one.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise PermissionError(errno.EPERM, "it is not a regular file", str(path))


def is_unfinished(path: Path, name: str) -> bool:
    """Say whether a killed `write_bytes` of a file of this name left the path."""
    is_named_so = path.name.startswith(f".{name}.") and path.name.endswith(".tmp")
    return is_named_so and path.is_file() and not path.is_symlink()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file in an error about it, in place of none or of its temporary name."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOENT and path.parent.is_dir():  # as in /proc
            raise PermissionError(errno.EACCES, "the folder takes no files", str(path)) from None
        error.filename = str(path)
        raise


def write_text(path: Path, content: str) -> None:
    """Replace or create `path` with UTF-8 text, as `write_bytes` does."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:  # Any: whatever JSON can hold
    """Replace or create `path` with indented JSON, as `write_bytes` does; NaN is refused."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def hash_file(path: Path) -> str:
    """Return the xxh128 of a file's content as 32 hexadecimal digits."""
    digest = xxhash.xxh128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


MOST_DIGITS = 300
"""Of a number that a float can hold."""


def _read_integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"it has a number of {len(text)} digits, at most {MOST_DIGITS} are read")
    return int(text)


def parse_json(content: bytes | str) -> Any:  # Any: whatever JSON can hold
    """Return the value of JSON that others wrote.

    Raises:
        ValueError: when it is none, is nested too deep, has a number that no float holds, or holds
            halves of letters, which no file or screen takes.
    """
    try:
        value = json.loads(content, parse_int=_read_integer)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock, waiting for whoever holds it; the end of a process frees its locks."""
    descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT)
    try:
        _lock(descriptor, path, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, path: Path) -> bool:
    """Lock an open file unless somebody else holds it; says whether it is ours now.

    It is, after a warning, where the file system has no locks.
    """
    try:
        _lock(descriptor, path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock(descriptor: int, path: Path, how: int) -> None:
    try:
        fcntl.flock(descriptor, how)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        log.warning(
            "warning: %s cannot be locked (%s): make sure yourself that no other process uses %s",
            path,
            error.strerror,
            path.parent,
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
