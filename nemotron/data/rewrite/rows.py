"""Rows of files in, rows of JSON lines out: one file, which appears when all is written."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from nemotron.data.prepare.conversations import without_nulls
from nemotron.data.prepare.inputs import Piece, plan
from nemotron.data.prepare.options import PrepareOptions
from nemotron.data.prepare.progress import PrepareProgress
from nemotron.data.prepare.read import Bad, Place, Tick, no_column, read_rows, read_text
from nemotron.errors import UserError
from nemotron.files import LARGEST_SMALL_FILE, naming, parse_json, refuse_device, sync
from nemotron.outputs import check_writable, unwritable
from nemotron.terminal import print_text

Row = Mapping[str, Any]  # Any: what a row holds
NAMED = 20
"""Bad rows that are named at the end."""


@dataclass
class Rows:
    """The rows of sources, which may be read several times; bad ones are named and counted."""

    sources: Sequence[str]
    columns: tuple[str, ...]
    """What is read of a table; of a text file, each line is the first of them."""
    max_bad_rows: int
    bad: list[str] = field(default_factory=list)
    """Place of each bad row and why; of the last reading."""

    def __iter__(self) -> Iterator[tuple[Place, Row]]:
        """Yield place and content of every row.

        Raises:
            UserError: when a source cannot be read, or too many rows are bad.
        """
        self.bad.clear()
        options = PrepareOptions(column=self.columns[0])
        made = plan(self.sources, PrepareOptions())
        with PrepareProgress(sum(unit.size for unit in made.units), 0) as progress:
            for unit in made.units:
                for piece in unit.pieces:
                    for found in self._read(piece, options, progress.advance):
                        if isinstance(found, Bad):
                            self.refuse(found.where, found.why)
                        else:
                            yield found

    def refuse(self, where: str, why: str) -> None:
        """Leave out a row.

        Raises:
            UserError: when there are too many of them.
        """
        self.bad.append("".join(c if c.isprintable() else ascii(c)[1:-1] for c in f"{where} {why}"))
        if len(self.bad) > self.max_bad_rows:
            raise UserError(
                f"{self.bad[0]} ({len(self.bad)} bad rows so far, --max-bad-rows "
                f"{self.max_bad_rows}); correct the input, or allow more."
            )

    def _read(
        self, piece: Piece, options: PrepareOptions, tick: Tick
    ) -> Iterator[tuple[Place, Row] | Bad]:
        if piece.kind != "text":
            for found in read_rows(piece, options, tick, self.columns):
                yield found if isinstance(found, Bad) else (found[0], without_nulls(found[1]))
            return
        parts: list[str] = []
        number = 0
        for chunk in read_text(piece, "\n", tick):
            if isinstance(chunk, Bad):
                yield chunk
                continue
            parts.append(chunk.text)
            if chunk.is_last:
                number += 1
                text, parts = "".join(parts), []
                if text:
                    yield partial("{}:{}".format, piece.path, number), {self.columns[0]: text}


def text_of(row: Row, column: str) -> str:
    """Return the text of a row.

    Raises:
        ValueError: when there is none, in one sentence.
    """
    text = row.get(column)
    if text is None:
        raise ValueError(no_column(column, row))
    if not isinstance(text, str):
        raise ValueError(f"has a {column} that is not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"has a {column} with a lone surrogate, which is not a character"
        ) from None
    if not text.strip():
        raise ValueError(f"has an empty {column}")
    return text


@dataclass(frozen=True)
class Written:
    """What became of rows that were rewritten."""

    read: int
    written: int


def rewrite(
    rows: Rows, out: Path, make: Callable[[int, Row], Iterable[Row]], *, overwrite: bool
) -> Written:
    """Write what `make` returns for each row, which it gets with its number.

    A row for which it raises ValueError is bad.

    Raises:
        UserError: when a source, or the output, is not fit; nothing is replaced then.
    """
    check_file(out, rows.sources, overwrite=overwrite)
    read = written = 0
    with new_lines(out) as file:
        for place, row in rows:
            read += 1
            try:
                lines = [_line(new) for new in make(read - 1, row)]
            except ValueError as error:
                rows.refuse(place(), str(error))
                continue
            file.writelines(lines)
            written += len(lines)
        if not written:
            first = f"; the first bad one: {rows.bad[0]}" if rows.bad else ""
            raise UserError(
                f"no row could be used{first}; nothing was written.", where=", ".join(rows.sources)
            )
    return Written(read, written)


def _line(row: Row) -> str:
    text = json.dumps(row, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds a lone surrogate, which is not a character") from None
    return text


def check_file(out: Path, sources: Iterable[str], *, overwrite: bool) -> None:
    """Check that a file may be written.

    Raises:
        UserError: when it is a folder or an input, or is there and may not be replaced, or has no
            place.
    """
    check_writable(out)
    if out.is_dir():
        raise UserError("is a folder; give the name of a file.", where=str(out))
    if any(os.path.realpath(source) == os.path.realpath(out) for source in sources):
        raise UserError("is an input; choose another file for the output.", where=str(out))
    if out.exists() and not out.is_file():
        raise UserError("is not a regular file; give another name.", where=str(out))
    if out.exists() and not overwrite:
        raise UserError("exists already; add --overwrite to replace it.", where=str(out))
    if out.exists() and not _has_lines_of_json(out):
        raise UserError(
            "holds no JSON lines, so it is not replaced; choose another file.", where=str(out)
        )


def _has_lines_of_json(path: Path) -> bool:
    """Say whether a file is empty or its first line is an object, as in those that we write."""
    with open(path, "rb") as file:
        first = file.read(1)
        if first != b"{":
            return not first
        line = first + file.readline(LARGEST_SMALL_FILE)
    try:
        return isinstance(parse_json(line), dict)
    except ValueError:
        return False


@contextmanager
def new_lines(out: Path) -> Iterator[TextIO]:
    """Yield a file that takes the name `out` when all is written.

    Raises:
        UserError: when the disk does not take it.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        refuse_device(out)
        with naming(out):
            try:
                with open(part, "wb") as raw:
                    file = io.TextIOWrapper(raw, encoding="utf-8", newline="\n")
                    yield file
                    file.flush()
                    sync(raw)
                    file.detach()
                os.replace(part, out)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(error, out, "nothing was replaced") from None


def print_bad(rows: Rows) -> None:
    """Name rows that were left out."""
    if rows.bad:
        print_text(f"left out: {len(rows.bad):,} unreadable")
    for line in rows.bad[:NAMED]:
        print_text(f"left out: {line}", sys.stderr)
