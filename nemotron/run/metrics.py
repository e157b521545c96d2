"""metrics.jsonl, the truth about a run: one JSON object a line, in the order of the steps."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from nemotron.files import open_regular, read_regular, write_bytes
from nemotron.run.appended import AppendedFile

Record = dict[str, float | int | str | None]
"""One line: `kind` (train, validation or event), `step` (updates done), and the values."""

ABANDONED = "metrics.abandoned.jsonl"
"""Lines of steps that a rollback undid; they no longer belong to the run."""
DAMAGED = "metrics.damaged.jsonl"
"""Lines that were no records when the file was opened."""
BESIDE = (ABANDONED, DAMAGED)


@dataclass(frozen=True)
class Lines:
    """The lines of a file, sorted out; each ends with a line break."""

    kept: list[bytes]
    """Records up to a step."""
    later: list[bytes]
    """Records after it."""
    damaged: list[bytes]
    """What is not a record, except a last line that a kill left half written."""


class MetricsFile:
    """Appends records; a line is complete in the file when `write` returns, or kept for later."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Open the file and remove the records after `last_step`.

        Damaged lines go to the end of a file beside this one.

        Raises:
            UserError: when one of the files is a link, a pipe or a device.
        """
        self.path = path
        self.num_damaged = 0
        self._file = AppendedFile(path)
        self._beside = {name: AppendedFile(path.with_name(name)) for name in BESIDE}
        if path.exists():
            lines = _sort_out(read_regular(path, sys.maxsize), last_step)
            self.num_damaged = len(lines.damaged)
            self._keep(lines, abandon=False)

    def write(self, record: Record) -> None:
        """Append one line; NaN and infinity, which JSON lacks, become null."""
        finite = {key: _json_value(value) for key, value in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")

    def roll_back(self, last_step: int) -> None:
        """Move the records after `last_step` to the end of a file beside this one."""
        content = self.path.read_bytes() + b"".join(self._file.take_kept())
        self._keep(_sort_out(content, last_step), abandon=True)

    def catch_up(self) -> OSError | None:
        """Write what was refused; returns why it still is, if it is."""
        problems = [file.catch_up() for file in (self._file, *self._beside.values())]
        return next((problem for problem in problems if problem is not None), None)

    def sync(self) -> None:
        """Force the lines to the disk, as far as it takes them, before a checkpoint."""
        self._file.sync()

    def close(self) -> None:
        """Close the file, after a last attempt to write what was refused."""
        for file in (self._file, *self._beside.values()):
            file.close()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _keep(self, lines: Lines, *, abandon: bool) -> None:
        """Leave the lines that are kept: by one system call if they are the file's beginning."""
        self._set_aside(DAMAGED, lines.damaged)
        if abandon:
            self._set_aside(ABANDONED, lines.later)
        content, current = b"".join(lines.kept), self.path.read_bytes()
        if current.startswith(content):
            os.truncate(self.path, len(content))
        elif content.startswith(current):
            self._file.write(content[len(current) :])
        else:
            self._file.close()
            write_bytes(self.path, content)
            self._file = AppendedFile(self.path)

    def _set_aside(self, name: str, lines: list[bytes]) -> None:
        if lines:
            self._beside[name].write(b"".join(lines))


class MetricsReader:
    """Reads the records of a file, which a run may be appending to.

    Lines that are no record are left out and counted, but for a last one that is not whole yet.
    """

    def __init__(
        self, path: Path, kinds: Sequence[str] = (), last_bytes: int | None = None
    ) -> None:
        """Read records of these kinds, by default of all; no other line is parsed.

        With `last_bytes`, only the whole lines of that end of the file are read.
        """
        self.path = path
        self._last_bytes = last_bytes
        self.num_damaged = 0
        """Lines that were no record, of those that were parsed so far."""
        self._marks = [json.dumps(kind).encode() for kind in kinds]

    def __iter__(self) -> Iterator[Record]:
        """Yield the records.

        Raises:
            OSError: when the file cannot be read, or is a link, a pipe or a device.
        """
        with open(open_regular(self.path, os.O_RDONLY), "rb") as file:
            if self._last_bytes is not None:
                size = os.fstat(file.fileno()).st_size
                if size > self._last_bytes:
                    file.seek(size - self._last_bytes)
                    file.readline()
            for line in file:
                if self._marks and not any(mark in line for mark in self._marks):
                    continue
                if (record := _parse(line)) is not None:
                    yield record
                elif line.endswith(b"\n"):
                    self.num_damaged += 1


def read_metrics(path: Path) -> list[Record]:
    """Return the records of a file; lines that are none are left out."""
    return list(MetricsReader(path))


def _sort_out(content: bytes, last_step: int) -> Lines:
    lines = Lines([], [], [])
    for line in content.splitlines(keepends=True):
        if (record := _parse(line)) is not None:
            is_kept = int(record["step"] or 0) <= last_step
            (lines.kept if is_kept else lines.later).append(line)
        elif line.endswith(b"\n"):
            lines.damaged.append(line)
    return lines


def _parse(line: bytes) -> Record | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    is_record = isinstance(record.get("step"), int) and isinstance(record.get("kind"), str)
    return record if is_record else None


def _json_value(value: float | int | str | None) -> float | int | str | None:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
