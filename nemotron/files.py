"""Writing files so that a reader, or a crash, never sees half of one; hashing and locking them."""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import xxhash


def sync(file: BinaryIO) -> None:
    """Put what was written to an open file onto the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace or create `path`: a reader finds the old content or all of the new one."""
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


def parse_json(content: bytes | str) -> Any:  # Any: whatever JSON can hold
    """Return the value of JSON that others wrote.

    Raises:
        ValueError: when it is none, is nested too deep, or holds halves of letters, which no file
            or screen takes.
    """
    try:
        value = json.loads(content)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    return value


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock, waiting for whoever holds it; the end of a process frees its locks."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(descriptor: int) -> bool:
    """Lock an open file unless somebody else holds it; says whether it is ours now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
