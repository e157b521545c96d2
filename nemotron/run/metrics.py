"""metrics.jsonl, the truth about a run: one JSON object a line, in the order of the steps."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from nemotron.files import write_bytes

Record = dict[str, float | int | str | None]
"""One line: `kind` (train, validation or event), `step` (updates done), and the values."""

ABANDONED = "metrics.abandoned.jsonl"
"""Lines of steps that a rollback undid; they no longer belong to the run."""
DAMAGED = "metrics.damaged.jsonl"
"""Lines that were no records when the file was opened."""


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
    """Appends records; a line is complete in the file when `write` returns."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Open the file and cut off what comes after `last_step`, as if it had never been.

        Damaged lines go to the end of a file beside this one.
        """
        self.path = path
        self.num_damaged = 0
        if path.exists():
            lines = _sort_out(path, last_step)
            self.num_damaged = len(lines.damaged)
            _append(path.with_name(DAMAGED), lines.damaged)
            _keep(path, lines.kept)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (see close)

    def write(self, record: Record) -> None:
        """Append one line; NaN and infinity, which JSON lacks, become null."""
        finite = {key: _json_value(value) for key, value in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def roll_back(self, last_step: int) -> None:
        """Take out what comes after `last_step`; it goes to the end of a file beside this one."""
        self._file.close()
        lines = _sort_out(self.path, last_step)
        _append(self.path.with_name(DAMAGED), lines.damaged)
        _append(self.path.with_name(ABANDONED), lines.later)
        _keep(self.path, lines.kept)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (see close)

    def sync(self) -> None:
        """Force the lines to the disk, before a checkpoint that builds on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[Record]:
    """Return the records of a file; lines that are none are left out."""
    records = []
    for line in path.read_bytes().splitlines(keepends=True):
        record = _parse(line)
        if record is not None:
            records.append(record)
    return records


def _sort_out(path: Path, last_step: int) -> Lines:
    lines = Lines([], [], [])
    for line in path.read_bytes().splitlines(keepends=True):
        if (record := _parse(line)) is not None:
            is_kept = int(record["step"] or 0) <= last_step
            (lines.kept if is_kept else lines.later).append(line)
        elif line.endswith(b"\n"):
            lines.damaged.append(line)
    return lines


def _keep(path: Path, lines: list[bytes]) -> None:
    """Leave only these lines: by one system call if they are the beginning of the file."""
    content = b"".join(lines)
    with open(path, "rb") as file:
        is_beginning = file.read(len(content)) == content
    if is_beginning:
        os.truncate(path, len(content))
    else:
        write_bytes(path, content)


def _append(path: Path, lines: list[bytes]) -> None:
    if lines:
        with open(path, "ab") as file:
            file.write(b"".join(lines))


def _parse(line: bytes) -> Record | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _json_value(value: float | int | str | None) -> float | int | str | None:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
