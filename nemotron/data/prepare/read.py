"""Rows of files and data sets, one after the other, in memory that does not grow."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, cast

from nemotron.data.prepare.hub import bad_value, read_hub
from nemotron.data.prepare.inputs import COMPRESSED, Piece, open_parquet
from nemotron.data.prepare.options import PrepareOptions, parse_filter
from nemotron.errors import UserError

BLOCK = 1 << 20
"""Bytes of a text file that are read at a time."""
ROWS_AT_ONCE = 64
"""Rows of a parquet file that are decoded at a time."""

Tick = Callable[[int], None]
"""Called with the bytes of input that were read since the last call."""
Place = Callable[[], str]
"""Says where a row stands; counting lines is left until somebody asks."""


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used: where it stands and why."""

    where: str
    why: str


@dataclass(frozen=True)
class Chunk:
    """Text of a document; a long document comes in several."""

    text: str
    is_last: bool


class _Separator:
    """Text between two documents; each of its line ends may be one of Windows in the file."""

    def __init__(self, text: str) -> None:
        plain = text.replace("\r\n", "\n")
        self.longest = len(plain) + plain.count("\n")
        self._pattern = re.compile(re.escape(plain).replace("\\\n", "\r?\n"))

    def split(self, text: str) -> list[str]:
        """Return what stands between the separators of a text."""
        return self._pattern.split(text)


def read_rows(
    piece: Piece, options: PrepareOptions, tick: Tick, columns: Sequence[str] = ()
) -> Iterator[tuple[Place, Mapping[str, Any]] | Bad]:
    """Yield place and content of every row of a piece of JSON lines, parquet or a data set.

    Of parquet, those of `columns` are read that are there; without it, those that the options name.

    Raises:
        UserError: when the file itself is damaged.
    """
    if piece.kind == "jsonl":
        yield from _read_json_lines(piece, options.max_row_bytes, tick)
    elif piece.kind == "parquet":
        wanted = columns or _columns(options)
        yield from _read_parquet(piece, wanted, None if columns else wanted[0], tick)
    else:
        for number, row in read_hub(piece.path, options.hub, piece.start, piece.stop):
            place = partial(_row_name, piece.path, number)
            yield Bad(place(), row) if isinstance(row, str) else (place, row)
        tick(piece.size)


def read_text(piece: Piece, separator: str | None, tick: Tick) -> Iterator[Chunk | Bad]:
    """Yield the documents of a text file in chunks; bytes that are no UTF-8 make the file bad."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # without the mark of byte order
    between = None if separator is None else _Separator(separator)
    rest, done = "", 0
    compressed = piece.path.lower().endswith(COMPRESSED)
    with _open(piece.path) as file:
        try:
            while block := _damage_named(piece.path, file, lambda f: f.read(BLOCK)):
                rest += decoder.decode(block)
                done += len(block)
                tick(0 if compressed else len(block))
                if between is None:
                    yield Chunk(rest, is_last=False)
                    rest = ""
                    continue
                *whole, rest = between.split(rest)
                for text in whole:
                    yield Chunk(text, is_last=True)
                keep = between.longest - 1  # what may be the beginning of a separator
                if len(rest) > max(BLOCK, keep):
                    yield Chunk(rest[: len(rest) - keep], is_last=False)
                    rest = rest[len(rest) - keep :]
            rest += decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            yield Bad(f"{piece.path} near byte {done + error.start}", "is not UTF-8 text")
            return
    yield Chunk(rest, is_last=True)
    tick(piece.size if compressed else 0)


def line_number(path: str, offset: int) -> int:
    """Return the number, from 1, of the line that begins at a byte of a file."""
    lines = 1
    with open(path, "rb") as file:
        while offset > 0 and (block := file.read(min(BLOCK, offset))):
            lines += block.count(b"\n")
            offset -= len(block)
    return lines


def _columns(options: PrepareOptions) -> list[str]:
    """Return the columns that are read: first the one without which a row is bad."""
    filtered = [parse_filter(text).column for text in options.filters]
    chat = options.chat
    if options.pairs is not None:
        return ["candidates", "target", "scores", "language", *filtered]
    if (pair := options.preferences) is not None:
        answers = [pair.chosen_column, pair.rejected_column]
        return [*answers, pair.prompt_column, pair.tools_column, *filtered]
    own = [options.column] if chat is None else [chat.messages_column, chat.tools_column]
    return [*own, *filtered]


def _read_json_lines(
    piece: Piece, most: int, tick: Tick
) -> Iterator[tuple[Place, Mapping[str, Any]] | Bad]:
    compressed = piece.path.lower().endswith(COMPRESSED)
    with _open(piece.path) as file:
        if piece.start:
            # the line that reaches into this piece belongs to the one before
            file.seek(piece.start - 1)
            _skip_line(file)
        at, number = 0 if compressed else file.tell(), 0
        while compressed or at < piece.stop:
            line = _damage_named(piece.path, file, lambda f: f.readline(most + 1))
            if not line:
                break
            number += 1
            too_long = len(line) > most and not line.endswith(b"\n")
            if too_long:
                _skip_line(file)
            end = file.tell() if too_long and not compressed else at + len(line)
            place = (
                partial(_line_name_at, piece.path, at)
                if piece.start
                else partial(_line_name, piece.path, number)
            )
            yield from _parse_line(line, place, too_long, most)
            if not compressed:
                tick(end - at)
            at = end
    if compressed:
        tick(piece.size)


def _parse_line(
    line: bytes, place: Place, too_long: bool, most: int
) -> Iterator[tuple[Place, Mapping[str, Any]] | Bad]:
    if too_long:
        yield Bad(place(), f"is longer than {most} bytes, the limit for a row")
        return
    if not line.strip():
        return
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        yield Bad(place(), "is not UTF-8 text")
    except RecursionError:
        yield Bad(place(), "is not valid JSON (nested too deep)")
    except ValueError as error:
        yield Bad(place(), f"is not valid JSON ({getattr(error, 'msg', 'a number is too long')})")
    else:
        if isinstance(row, dict):
            yield place, row
        else:
            kind = "a JSON list, with all rows in it" if isinstance(row, list) else "JSON"
            yield Bad(place(), f"is {kind}, but not an object; each line is one row, {{...}}")


def _line_name(path: str, number: int) -> str:
    return f"{path}:{number}"


def _line_name_at(path: str, offset: int) -> str:
    return f"{path}:{line_number(path, offset)}"


def _row_name(path: str, number: int) -> str:
    return f"{path} row {number}"


def _read_parquet(
    piece: Piece, columns: Sequence[str], needed: str | None, tick: Tick
) -> Iterator[tuple[Place, Mapping[str, Any]] | Bad]:
    import pyarrow

    file = open_parquet(piece.path)
    names = file.schema_arrow.names
    chosen = [name for name in dict.fromkeys(columns) if name in names]
    groups = range(piece.start, piece.stop)
    first = number = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
    if needed is not None and needed not in names:
        for number in range(
            first, first + sum(file.metadata.row_group(i).num_rows for i in groups)
        ):
            yield Bad(_row_name(piece.path, number), no_column(needed, names))
        tick(piece.size)
        return
    try:
        for batch in file.iter_batches(
            ROWS_AT_ONCE, row_groups=list(groups), columns=chosen, use_threads=False
        ):
            for row in _rows_of(batch):
                place = partial(_row_name, piece.path, number)
                yield Bad(place(), row) if isinstance(row, str) else (place, row)
                number += 1
    except (OSError, pyarrow.ArrowException) as error:
        rule = f"row group {piece.start} (rows {first} on) cannot be read: {_reason(error)}"
        raise UserError(rule, where=str(piece.path)) from None
    tick(piece.size)


def _rows_of(batch: Any) -> Iterator[Mapping[str, Any] | str]:  # Any: pyarrow has no types
    """Yield each row, or why it cannot be read."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):
        pass  # one value spoils the batch, so look at the rows one by one
    for number in range(batch.num_rows):
        row: dict[str, Any] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                row[name] = column[number].as_py()
            except (ValueError, OverflowError) as error:
                yield bad_value(name, error)
                break
        else:
            yield row


def no_column(column: str, names: Collection[str]) -> str:
    """Say that a row lacks the column that is read, and what may be meant."""
    hint = ""
    if "conversations" in names:
        way = "nemotron data prepare --chat --messages conversations"
        hint = f"; for rows of the ShareGPT form use {way}"
    elif "messages" in names:
        hint = "; for conversations use nemotron data prepare --chat"
    elif {"instruction", "output"} <= set(names):
        hint = "; rows of the Alpaca form must be converted to messages first"
    return f"has no column {column} (its columns: {', '.join(names) or 'none'}){hint}"


def _open(path: str) -> BinaryIO:
    lower = path.lower()
    if lower.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if lower.endswith(".bz2"):
        return cast(BinaryIO, bz2.open(path, "rb"))
    if lower.endswith(".xz"):
        return cast(BinaryIO, lzma.open(path, "rb"))
    if lower.endswith(".zst"):
        from nemotron.data.prepare.zstd import ZstdFile

        return io.BufferedReader(ZstdFile(path), BLOCK)
    return open(path, "rb")


def _damage_named(path: str, file: BinaryIO, read: Callable[[BinaryIO], bytes]) -> bytes:
    try:
        return read(file)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        reason = _reason(error)
    except Exception as error:  # zstandard's own kind, which is imported only when needed
        if type(error).__name__ != "ZstdError":
            raise
        reason = _reason(error)
    raise UserError(f"is damaged: {reason}", where=str(path))


def _skip_line(file: BinaryIO) -> None:
    while (part := file.readline(BLOCK)) and not part.endswith(b"\n"):
        pass


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{text.rstrip('.')}."
