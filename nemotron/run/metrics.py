"""metrics.jsonl, the truth about a run: one JSON object a line, in the order of the steps."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Self

Record = dict[str, float | int | str | None]
"""One line: `kind` (train, validation or event), `step` (updates done), and the values."""

ABANDONED = "metrics.abandoned.jsonl"
"""Lines of steps that a rollback undid; they no longer belong to the run."""


class MetricsFile:
    """Appends records; a line is complete in the file when `write` returns."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Open the file and cut off what comes after `last_step`, as if it had never been."""
        self.path = path
        if path.exists():
            _cut_after(path, last_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (see close)

    def write(self, record: Record) -> None:
        """Append one line; NaN and infinity, which JSON lacks, become null."""
        finite = {key: _json_value(value) for key, value in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def roll_back(self, last_step: int) -> None:
        """Take out what comes after `last_step`; it goes to the end of a file beside this one."""
        text = self.path.read_bytes()
        _cut_after(self.path, last_step)
        with open(self.path.with_name(ABANDONED), "ab") as file:
            file.write(text[self.path.stat().st_size :])

    def sync(self) -> None:
        """Force the lines to the disk, before a checkpoint that builds on them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[Record]:
    """Return the records of a file; a last line that is only half there is left out."""
    records = []
    for line in path.read_bytes().splitlines(keepends=True):
        record = _parse(line)
        if record is not None:
            records.append(record)
    return records


def _cut_after(path: Path, last_step: int) -> None:
    """Shorten the file, in one system call, to the lines up to `last_step`."""
    keep = 0
    for line in path.read_bytes().splitlines(keepends=True):
        record = _parse(line)
        if record is None or int(record["step"] or 0) > last_step:
            break
        keep += len(line)
    os.truncate(path, keep)


def _parse(line: bytes) -> Record | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _json_value(value: float | int | str | None) -> float | int | str | None:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
